"""The claims: each is measured in a tiny setting, its rule says no to what refutes it, and its page is rendered."""

import copy
import math

import numpy as np
import pytest

import minilora as ml
from examples.claims import (
    NAMES,
    __main__,
    alpha_over_r,
    common,
    forgetting,
    intrinsic_rank,
    latency,
    memory,
    page,
    rank_sweep,
    subspaces,
    swapping,
    trade_off,
    which_matrices,
)
from tests import texts

ONE = {"rates": (1e-3,), "steps": 2}
SMALL = {
    "rank_sweep": {**ONE, "ranks": (1, 8), "full_rates": (1e-3, 2e-3), "seeds": 2},
    "intrinsic_rank": {**ONE, "ranks": (1, 8), "seeds": 2},
    "forgetting": {**ONE, "full_rates": (1e-3,), "steps": 4, "stops": (0.5, 1.0), "seeds": 2},
    "alpha_over_r": {"ranks": (4, 8), "rates": (1e-4, 1e-3, 1e-2), "steps": 2, "seeds": 2},
    "which_matrices": {
        "steps": 1,
        "seeds": 2,
        "kinds": {k: which_matrices.KINDS[k] for k in ("q", "v", "q, v", "all")},
    },
    "subspaces": {"ranks": (2, 6), "steps": 3, "seeds": 2},
    "memory": {"ways": {k: memory.WAYS[k] for k in ("full fine-tuning", "LoRA, q and v")}, "tokens": 8, "repeat": 1},
    "latency": {"rounds": 2},
    "swapping": {"counts": (1, 3), "switches": 6, "loads": 1},
    "trade_off": {
        **ONE,
        "seeds": 2,
        "ways": {k: trade_off.WAYS[k] for k in ("full fine-tuning", "LoRA, rank 8", trade_off.EMBEDDINGS)},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model, with few of each task's test rows."""
    path = tmp_path_factory.mktemp("claims") / "base"
    texts.model().save(path)
    with pytest.MonkeyPatch.context() as patch:
        drawn = common.date_rows
        patch.setattr(common, "date_rows", lambda seed: tuple(part[:400] for part in drawn(seed)))
        for name in ("dates", "other_language"):
            whole = getattr(common, name)

            def few(model, seed=0, whole=whole):
                task = whole(model, seed)
                return common.Task(task.train[:60], task.valid[:4], task.test[:6])

            for module in map(page.claim, NAMES):
                if hasattr(module, name):
                    patch.setattr(module, name, few)
        patch.setattr(forgetting, "general_text", lambda model: common.general_text(model)[:3])
        yield common.Base(str(path))


@pytest.fixture(scope="module")
def measured(base):
    """The results of each claim on the tiny model, measured once, as JSON gives them back."""
    found = {}

    def results(name):
        if name not in found:
            found[name] = page.claim(name).measure(base, **SMALL[name])
        return copy.deepcopy(found[name])

    return results


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", NAMES)
def test_a_claim_is_measured_judged_drawn_and_written_down(name, measured, base, tmp_path, monkeypatch):
    module = page.claim(name)
    results = measured(name)
    monkeypatch.setattr(module, "measure", lambda base, **settings: results)
    for where in (base, common.Base("mini")):
        __main__.run(name, where, tmp_path)
    __main__.draw(name, tmp_path)
    page.write_pages(tmp_path)
    text = (tmp_path / f"{name}.md").read_text("utf-8")
    for model, stem in (("mini", name), (base.name, f"{name}-base")):
        (found,) = [found for found in page.measured(name, tmp_path) if found["model"] == model]
        verdict = module.verdict(found["results"])
        assert f"## On {model}\n\n**Verdict: it {verdict.word}.**" in text
        assert module.rows(found["results"]) in text
        assert f"({stem}.png)" in text
        assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{stem}.png").stat().st_size < 60_000
    assert "**Claim.**" in text
    assert "**Measured.**" in text
    assert "**Refuted.**" in text
    assert f"]({name}.md)" in (tmp_path / "index.md").read_text("utf-8")


def test_the_pages_in_docs_are_those_of_the_numbers_in_docs():
    rendered = [name for name in NAMES if page.measured(name, page.DOCS)]
    assert rendered
    for name in rendered:
        assert (page.DOCS / f"{name}.md").read_text("utf-8") == page.page(name, page.DOCS), name
        for file in page.DOCS.glob(f"{name}*.png"):
            assert file.stat().st_size < 60_000
    for place in (page.DOCS / "index.md", page.HERE / "README.md"):
        assert place.read_text("utf-8") == page.index(page.DOCS, place)


def test_a_name_that_is_no_claim_is_refused_with_the_names(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["examples.claims", "nonsense"])
    with pytest.raises(SystemExit):
        __main__.main()
    assert "rank_sweep" in capsys.readouterr().err


def test_a_model_has_its_own_settings_and_the_command_the_last_word_on_seeds():
    mini, other = common.Base("mini"), common.Base("smollm2", "cuda")
    assert __main__.settings(which_matrices, mini, None) == {}
    assert __main__.settings(which_matrices, other, None) == which_matrices.SETTINGS["smollm2"]
    assert __main__.settings(which_matrices, other, 7)["seeds"] == 7
    assert __main__.settings(latency, mini, 7) == {}  # it takes none


def test_the_sizes_that_were_measured_are_kept_and_said_on_the_page(base, measured, tmp_path, monkeypatch):
    results = measured("which_matrices")
    found = {}

    def measure(base, kinds=which_matrices.KINDS, steps=60, lr=2e-3, seeds=3):
        found.update(steps=steps, lr=lr, seeds=seeds)
        return results

    monkeypatch.setattr(which_matrices, "measure", measure)
    __main__.run("which_matrices", base, tmp_path, seeds=2)
    (kept,) = page.measured("which_matrices", tmp_path)
    assert kept["sizes"] == found == {"steps": 60, "lr": 2e-3, "seeds": 2}
    assert page.sizes_in_words({**kept["sizes"], "full_rates": [1e-4, 3]}) == (
        "steps 60; lr 0.002; seeds 2; full rates 0.0001, 3"
    )
    assert "Measured with steps 60; lr 0.002; seeds 2, by" in page.page("which_matrices", tmp_path)


def test_a_claim_that_fails_on_a_model_says_why_there_alone(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(trade_off, "WHY_NOT", {"mini": "Because it is small."}, raising=False)
    results = measured("trade_off")
    monkeypatch.setattr(trade_off, "measure", lambda base, **settings: results)
    __main__.run("trade_off", common.Base("mini"), tmp_path)
    for holds, said in ((False, True), (None, True), (True, False)):
        monkeypatch.setattr(trade_off, "verdict", lambda results, holds=holds: common.Verdict(holds, "seen"))
        assert ("Because it is small." in page.page("trade_off", tmp_path)) == said
    assert page.explanation(trade_off, "another") == ""


def test_a_claim_that_was_measured_on_mini_alone_says_so(measured, tmp_path, monkeypatch):
    results = measured("latency")
    monkeypatch.setattr(latency, "measure", lambda base, **settings: results)
    for model, said in (("mini", True), ("smollm2", False)):
        __main__.run("latency", common.Base(model), tmp_path)
        assert ("`mini` only" in page.page("latency", tmp_path)) == said


def test_numbers_of_a_gpu_lie_beside_those_of_the_cpu():
    stems = [page.stem("memory", *where) for where in (("mini", "cpu"), ("smollm2", "cpu"), ("smollm2", "cuda"))]
    assert stems == ["memory", "memory-smollm2", "memory-smollm2-gpu"]


# ---------------------------------------------------------------- what they share


def test_a_fresh_base_shares_no_array_with_another(base):
    one, other = common.fresh(base), common.fresh(base)
    next(iter(dict(one.network.named_parameters()).values())).data[...] = 0
    one.add_adapter("a", ml.LoraConfig(r=2))
    assert not other.adapters
    expected = dict(common.load(base).network.named_parameters())
    for name, parameter in other.network.named_parameters():
        assert np.array_equal(parameter.data, expected[name].data)


def test_training_leaves_the_base_of_lora_alone_and_changes_all_of_it_in_full_fine_tuning(base):
    rows = common.dates(common.load(base)).train[:8]
    before = dict(common.load(base).network.named_parameters())
    for way, expected in ((ml.LoraConfig(r=2), False), (common.FULL, True)):
        tuned = common.trained(base, way, rows, lr=1e-3, steps=1, batch_size=4)
        changed = [not np.array_equal(p.data, before[name].data) for name, p in tuned.network.named_parameters()]
        assert any(changed) == all(changed) == expected


def test_the_same_seed_trains_the_same_model_and_another_seed_another(base):
    rows = common.dates(common.load(base)).train[:16]
    losses = [common.loss(common.trained(base, ml.LoraConfig(r=2), rows, 1e-2, 3, 4, seed), rows) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    starts = [common.trained(base, ml.LoraConfig(r=2), rows, 1e-2, 0, seed=seed).parameters() for seed in (0, 0, 1)]
    key = next(key for key in starts[0] if "lora_A" in key)
    assert np.array_equal(starts[0][key].data, starts[1][key].data)
    assert not np.array_equal(starts[0][key].data, starts[2][key].data)


def test_no_row_is_in_two_parts_of_a_task(base):
    model = common.load(base)
    for whole in (common.dates, common.other_language):
        task = whole(model)
        parts = [{tuple(row.tokens) for row in part} for part in (task.train, task.valid, task.test)]
        assert not parts[0] & parts[1]
        assert not parts[0] & parts[2]
        assert not parts[1] & parts[2]


def test_the_other_language_is_undone_by_doing_it_twice():
    text = "In the beginning: Az, zA."
    assert common.thirteen_on("Abc xyz") == "Nop klm"
    assert common.thirteen_on(common.thirteen_on(text)) == text


def test_the_best_rate_is_that_of_the_lowest_loss_on_the_rows_that_choose(monkeypatch):
    monkeypatch.setattr(common, "loss", lambda model, rows: abs(math.log(model / rows)))
    assert common.best_rate([1.0, 10.0, 100.0], lambda rate: rate, 12) == (10.0, 10.0)


def test_rows_are_exactly_right_where_greedy_decoding_writes_them(base):
    model = common.load(base)
    rows = common.examples(model, [{"prompt": "hello", "completion": " 1"}] * 2)
    prompt = list(rows[0].prompt_tokens)
    written = model.generate(prompt, len(rows[0].tokens) - len(prompt), stop=[])
    tokens = np.array(prompt + written, np.int32)
    labels = np.where(np.arange(len(tokens)) < len(prompt), -100, tokens)
    right = common.Example(tokens, labels, len(prompt), "")
    assert common.exact_share(model, [right]) == 1
    wrong = tokens.copy()
    wrong[-1] = (wrong[-1] + 1) % model.config.vocab_size
    last = common.Example(wrong, np.where(labels < 0, labels, wrong), len(prompt), "")
    assert common.exact_share(model, [right, last]) == 0.5


# ---------------------------------------------------------------- the rules: numbers that confirm, numbers that refute


def test_rank_sweep_is_refuted_by_a_rank_8_far_from_full_and_half_by_a_better_rank_64():
    def of(rank_8, rank_64, full=1.0):
        losses = {None: full, 8: rank_8, 64: rank_64}
        return rank_sweep.verdict({"base": 2.0, "runs": [{"rank": k, "losses": [v]} for k, v in losses.items()]})

    assert of(1.05, 1.02).holds is True
    assert of(1.5, 1.0).holds is False
    assert of(1.09, 1.0).holds is None
    assert of(1.5, 1.5).holds is None


def test_intrinsic_rank_is_refuted_where_the_cut_loses_the_task_and_the_spectrum_is_flat():
    def of(at_8, half):
        runs = [{"full": 1.0, "cut": {"0": 2.0, "8": at_8}, "layers": [{"half": half}]}]
        return intrinsic_rank.verdict({"runs": runs, "random": {"half": 40}})

    assert of(1.05, 10).holds is True
    assert of(1.05, 30).holds is None
    assert of(1.5, 10).holds is None
    assert of(1.5, 30).holds is False


def test_singular_values_are_counted_until_half_of_the_energy_is_reached():
    assert intrinsic_rank.values_for_half(np.array([3.0, 1.0, 1.0])) == 1
    assert intrinsic_rank.values_for_half(np.ones(10)) == 5
    assert intrinsic_rank.energy(np.array([2.0, 1.0, 1.0]), 1) == pytest.approx(4 / 6)


def test_an_update_of_low_rank_is_left_whole_by_the_cut(base, monkeypatch):
    """If training changed every linear layer by a matrix of rank 1, cutting to 1 or more changes no loss."""
    random = np.random.default_rng(0)

    def of_rank_1(base, *settings):
        tuned = common.load(base)
        tuned.unfreeze(".*")
        for weight in intrinsic_rank.linear_weights(tuned).values():
            weight += 0.1 * np.outer(random.normal(size=len(weight)), random.normal(size=weight.shape[1]))
        return tuned

    monkeypatch.setattr(intrinsic_rank, "trained", of_rank_1)
    (found, _) = intrinsic_rank.measure(base, **SMALL["intrinsic_rank"])["runs"]
    assert found["cut"]["1"] == pytest.approx(found["full"], rel=1e-5)
    assert found["cut"]["0"] != pytest.approx(found["full"], rel=1e-3)
    assert all(layer["half"] == 1 and layer["effective_rank"] < 1.01 for layer in found["layers"])


def forgetting_of(*points):
    """Results of points (way, loss on dates, loss on English), each way's in the order in which it came to them."""
    found = [{"way": w, "lr": 1, "seed": 0, "step": k, "task": t, "english": e} for k, (w, t, e) in enumerate(points)]
    return {"base": {"task": 9.0, "english": 5.0}, "points": found}


def test_forgetting_is_compared_where_both_have_learned_alike_and_refuted_by_a_lora_that_forgets_as_much():
    full, lora = forgetting.WAYS

    def of(*points):
        return forgetting.verdict(forgetting_of(*points))

    early, late = (full, 1.0, 5.4), (full, 0.5, 7.0)
    assert of(early, late, (lora, 0.5, 5.5)).holds is True
    assert of(early, late, (lora, 0.5, 6.9)).holds is False
    assert of(early, late, (lora, 1.0, 5.4)).holds is False  # it learned no more than full had early on
    assert of((full, 0.5, 4.9), (lora, 0.5, 4.8)).holds is False


def test_the_loss_on_english_is_read_where_the_loss_on_dates_comes_down_to_a_level():
    points = [{"task": task, "english": english} for task, english in ((3.0, 6.0), (1.0, 8.0), (2.0, 7.0))]
    before = {"task": 9.0, "english": 5.0}
    for level, expected in ((9.0, 5.0), (6.0, 5.5), (3.0, 6.0), (1.5, 7.5), (1.0, 8.0), (0.9, math.inf)):
        assert forgetting.english_at(level, before, points) == pytest.approx(expected)


def test_at_every_level_each_way_takes_the_rate_that_forgets_least():
    full, lora = forgetting.WAYS
    results = forgetting_of((full, 1.0, 6.0), (lora, 0.4, 8.0))
    results["points"].append({"way": full, "lr": 2, "seed": 0, "step": 9, "task": 1.0, "english": 5.5})
    assert list(forgetting.levels(results).values()) == pytest.approx([9 - share * 8 for share in forgetting.SHARES])
    found = forgetting.rises(results)
    assert found[full] == {share: [pytest.approx(0.5 * share)] for share in forgetting.SHARES}
    assert found[lora][1.0] == [pytest.approx(3 * 8 / 8.6)]


def test_alpha_over_r_is_refuted_where_its_best_rate_moves_or_no_scale_does_as_well():
    rates = (1e-4, 1e-3, 1e-2)

    def valley(at):
        return {f"{rate:g}": [abs(math.log(rate / at))] for rate in rates}

    def of(ours, none, moved=1.0):
        best = {"alpha / r": ours, "alpha / sqrt(r)": 1e-3, "no scale": none}
        losses = {scale: {"4": valley(1e-3), "64": valley(rate)} for scale, rate in best.items()}
        movement = {scale: {"4": [1.0], "64": [moved]} for scale in best}
        return alpha_over_r.verdict({"movement": movement, "losses": losses})

    assert of(1e-3, 1e-4).holds is True
    assert of(1e-4, 1e-3).holds is False
    assert of(1e-3, 1e-3).holds is None
    assert of(1e-3, 1e-4, moved=2.0).holds is None


def test_the_best_rate_lies_at_the_bottom_of_the_parabola_between_the_rates():
    losses = {f"{rate:g}": (math.log(rate) - math.log(2e-3)) ** 2 for rate in (1e-4, 1e-3, 1e-2)}
    assert alpha_over_r.best_of(losses) == pytest.approx(2e-3)
    assert alpha_over_r.best_of({"0.1": 1.0, "1": 2.0, "10": math.inf}) == 0.1


def test_the_three_scales_are_one_at_the_reference_rank_and_differ_at_others():
    for rank, alike in ((alpha_over_r.REFERENCE, 1), (64, 3)):
        ways = [alpha_over_r.way_of(scale, rank) for scale in alpha_over_r.SCALES]
        assert len({round(way.scale(way.r, way.alpha), 9) for way in ways}) == alike


def test_which_matrices_is_refuted_by_a_single_kind_that_is_as_good():
    def of(spread, single):
        runs = [{"kinds": "q, v", "losses": [spread, spread + 0.02]}, {"kinds": "o", "losses": [single, single]}]
        runs += [{"kinds": name, "losses": [9.0]} for name in ("q", "k", "v", "q, k, v, o")]
        return which_matrices.verdict({"runs": runs})

    assert of(0.5, 0.6).holds is True
    assert of(0.5, 0.52).holds is False
    assert of(0.5, 0.4).holds is False


def test_which_matrices_gives_each_set_nearly_the_same_number_of_parameters(measured):
    counts = {run["kinds"]: run["parameters"] for run in measured("which_matrices")["runs"]}
    assert all(abs(count / counts["all"] - 1) < 0.1 for count in counts.values()), counts


def test_subspaces_is_refuted_by_directions_that_are_not_shared_and_updates_within_w():
    def of(first, rest, within, factor, larger):
        amplified = {"8": {"within": [within], "own": [2.0], "factor": [factor]}, "64": {"factor": [larger]}}
        similar = {"q": {"first": [first], "rest": [rest]}, "v": {"first": [0.1], "rest": [0.0]}}
        return subspaces.verdict(
            {"losses": {"8": 1, "64": 1}, "similar": similar, "amplified": {"q": amplified, "v": amplified}}
        )

    assert of(0.8, 0.2, 0.3, 20.0, 2.0).holds is True
    assert of(0.4, 0.0, 0.3, 20.0, 2.0).holds is None
    assert of(0.8, 0.7, 0.3, 20.0, 2.0).holds is None
    assert of(0.8, 0.2, 1.9, 20.0, 2.0).holds is None
    assert of(0.8, 0.2, 0.3, 2.0, 3.0).holds is None
    assert of(0.4, 0.0, 0.3, 0.5, 0.1).holds is False


def test_what_of_w_lies_in_an_update_is_all_of_it_for_w_itself(base):
    weight = np.random.default_rng(0).normal(size=(5, 7))
    U, values, V = np.linalg.svd(weight, full_matrices=False)
    found = subspaces.amplification([(subspaces.Weight(weight), subspaces.Spectrum(U, 3 * values, V.T))])
    assert found["within"] == pytest.approx(found["own"])
    assert found["factor"] == pytest.approx(3)


def test_memory_is_refuted_by_a_large_peak_or_bytes_that_are_not_those_of_the_trained(measured):
    found = measured("memory")
    for way in found["ways"].values():
        assert way["gradients"] + way["moments"] == memory.BYTES * way["trained"]
    assert found["ways"]["LoRA, q and v"]["trained"] < found["ways"]["full fine-tuning"]["trained"]
    ways = {"full fine-tuning": (300.0, 12), "LoRA, q and v": (100.0, 12)}

    def of(peak=100.0, gradients=4):
        parts = {"trained": 1, "gradients": gradients, "moments": 8}
        return memory.verdict({"ways": {k: {**parts, "peak": peak if "q" in k else 300.0} for k in ways}})

    assert of().holds is True
    assert of(peak=200.0).holds is None
    assert of(gradients=8).holds is None
    assert of(peak=200.0, gradients=8).holds is False


def test_a_process_that_fails_is_an_error_that_names_why():
    with pytest.raises(ml.MiniloraError, match="no-such-model"):
        memory.in_a_process(common.Base("no-such-model"), "full", 8)


def test_latency_is_refuted_by_a_slow_merged_model_or_other_logits(measured):
    def of(merged=1.0, noise=0.001, difference=1e-6, restored=True):
        ratios, spreads = {"logits": {"adapter": 1.2, "merged": merged}}, {"logits": {"adapter": 0, "merged": noise}}
        return latency.verdict({"ratios": ratios, "noise": spreads, "difference": difference, "restored": restored})

    assert of().holds is True
    assert of(merged=1.2).holds is False
    assert of(merged=1.2, noise=0.1).holds is True
    assert of(difference=1e-2).holds is False
    assert of(restored=False).holds is False
    assert measured("latency")["difference"] < latency.ROUNDING
    assert measured("latency")["restored"]


def test_swapping_is_refuted_by_a_slow_switch_a_copy_or_other_logits(measured):
    good = {
        "seconds": {"1": 1e-5}, "load": 0.1, "allocated": 100, "adapter_bytes": 10**6, "base_kept": True,
        "same_logits": True,
    }  # fmt: skip
    assert swapping.verdict(good).holds is True
    for wrong in (
        {"seconds": {"1": 1e-5, "50": 2e-3}, "load": 10.0},
        {"load": 5e-4},
        {"allocated": 10**6},
        {"base_kept": False},
        {"same_logits": False},
    ):
        assert swapping.verdict({**good, **wrong}).holds is False, wrong
    found = measured("swapping")
    assert found["base_kept"]
    assert found["same_logits"]


def test_trade_off_is_refuted_by_a_lora_that_learns_as_much_and_half_where_only_the_frequencies_hide_it():
    def of(lora):
        losses = {"full fine-tuning": 1.0, "LoRA, rank 1": 2.9, "LoRA, rank 8": lora, trade_off.EMBEDDINGS: 1.0}
        runs = [{"way": name, "losses": [loss]} for name, loss in losses.items()]
        return trade_off.verdict({"base": 9.0, "frequencies": 3.0, "runs": runs})

    assert of(1.9).holds is True
    assert of(1.5).holds is None
    assert of(1.1).holds is False
    assert "rank 8" in of(1.5).why


def test_the_frequencies_loss_is_the_entropy_where_both_parts_are_alike_and_all_tokens_known():
    tokens = np.array([0, *[1] * 3000, *[2] * 1000], np.int32)
    row = common.Example(tokens, tokens, 0, "")
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert trade_off.frequency_loss([row], [row], 3) == pytest.approx(expected, rel=1e-3)
    unseen = common.Example(np.array([1, 0], np.int32), np.array([1, 0], np.int32), 0, "")
    assert trade_off.frequency_loss([row], [unseen], 3) == pytest.approx(math.log(4003))
