"""Errors name settings as they are typed, and only those."""

import pytest

from minilora.cli.messages import one_line

OPTIONS = {"rank", "targets", "init", "dora", "max_length", "steps", "epochs", "dtype", "adapter_dtype", "model"}


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("LoraConfig.r is 0, expected 1", "--rank is 0, expected 1"),
        ("target_modules 'q' matches no layer", "--targets 'q' matches no layer"),
        ("max_length is 9, over 8", "--max-length is 9, over 8"),
        ("length is 9, over 8", "--max-length is 9, over 8"),
        ("file_dtype is 'x'", "--adapter-dtype is 'x'"),
        ("found steps = 3 and epochs = 2, expected one", "found --steps 3 and --epochs 2, expected one"),
        ("found use_dora=True and init='pissa', no", "found --dora and --init 'pissa', no"),
        # what the command has no option for, and what is no setting, stays
        ("LoraConfig.dropout is 2, expected less", "LoraConfig.dropout is 2, expected less"),
        ("found eval_every = 3 and no rows", "found eval_every = 3 and no rows"),
        ("model/rank is no folder", "model/rank is no folder"),
        ("a.jsonl, line 2: init is the word", "a.jsonl, line 2: init is the word"),
        ("steps is a file, expected a folder", "steps is a file, expected a folder"),
        ("no such file or folder: runs/steps=3; expected one", "no such file or folder: runs/steps=3; expected one"),
        ("no such file or folder: steps=3/a.jsonl", "no such file or folder: steps=3/a.jsonl"),
        ("runs/rank=8/steps=3 holds an earlier run", "runs/rank=8/steps=3 holds an earlier run"),
        ("the model has no tokenizer", "the model has no tokenizer"),
        ("two\n lines\x1b[2J", "two lines\\x1b[2J"),
    ],
)
def test_a_setting_is_named_by_its_flag(message, shown):
    assert one_line(message, OPTIONS) == shown
