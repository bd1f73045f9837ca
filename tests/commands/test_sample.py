"""`minigpt sample` as a user meets it: text and only text on stdout, whole characters, no surprises."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clock import PATIENCE
from commands.conftest import TINY, Done, call, command, environment, on_a_terminal, run, sets
from minigpt_cli import generate, load
from minigpt_cli.core import checkpoint
from minigpt_cli.core.config import parse_config
from minigpt_cli.core.model import GPT
from minigpt_cli.core.tokenizer import ByteTokenizer, CharTokenizer

BEST = "checkpoints/best.safetensors"


def sample(*arguments: object, stdin: bytes = b"") -> Done:
    return call("sample", "--ckpt", BEST, *arguments, stdin=stdin)


def text_of(done: Done) -> str:
    """stdout of a command that had nothing else to say."""
    assert (done.code, done.err) == (0, "")
    return done.out


def test_stdout_is_the_prompt_and_exactly_so_many_tokens(here: Path) -> None:
    done = run("sample", "--ckpt", BEST, "--prompt-file", "-", "--tokens", "40", stdin=b"the king")
    text = text_of(done)
    assert text.startswith("the king")
    assert len(text) == len("the king") + 40
    assert set(text) <= set((here / "input.txt").read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere decode.c is not tried")
def test_without_a_compiler_there_is_a_line_and_the_same_text(here: Path) -> None:
    arguments = ("sample", "--ckpt", BEST, "--tokens", 60, "--temperature", 0)
    done = run(*arguments, CC="/no/such/cc")
    assert (done.code, done.out) == (0, text_of(call(*arguments)))
    assert done.err == "compile: off, decoding is slower without (no C compiler (/no/such/cc) is installed)\n"


def test_without_a_prompt_it_begins_after_token_0_which_is_not_printed(polyglot: Path) -> None:
    assert checkpoint.load(polyglot / "char/last.safetensors").tokenizer.decode([0]) == "\x07"
    arguments = ["sample", "--ckpt", polyglot / "char/last.safetensors", "--tokens", 20, "--temperature", 0]
    text = text_of(call(*arguments))
    assert text.startswith("\r\nZeile eins ")  # what follows that character in the text
    assert text_of(call(*arguments, "--prompt", "")) == text


def test_a_text_ends_with_its_document_and_without_a_prompt_one_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [f"{i}: my lord." for i in range(10)]
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 30))
    assert call("prepare", "a.jsonl", "--out", "data/a", "--val-fraction", 0.2).code == 0
    more = sets(train__max_iters=150, train__eval_interval=150, train__learning_rate="1e-2", data__path="data/a")
    assert call("train", "--config", "gpt", *TINY, *more, *sets(model__n_embd=32)).code == 0
    greedy = ("sample", "--ckpt", BEST, "--temperature", 0, "--tokens", 100)
    assert text_of(call(*greedy)) in texts
    assert text_of(call(*greedy, "--prompt", "3: my")) == "3: my lord."
    assert text_of(call(*greedy, "--prompt", "3: my", "--stop", "rd")) == "3: my lo"
    assert text_of(call(*greedy, "--prompt", "3: my", "--num-samples", 2)) == "3: my lord.\n---\n3: my lord."
    assert text_of(call(*greedy, "--prompt", "3: my", "--show-probs")).splitlines()[-1].startswith("<end of text>")
    scores = json.loads(text_of(call("eval", "--ckpt", BEST, "--json")))
    val = json.loads(Path("data/a/meta.json").read_text())["val"]
    assert scores["tokens"] - scores["bytes"] == val["documents"]  # an end of text stands for no text


def test_greedy_text_is_the_same_every_time(here: Path) -> None:
    texts = {text_of(sample("--temperature", 0, "--tokens", 60, "--prompt", "the ")) for _ in range(3)}
    assert len(texts) == 1
    assert text_of(sample("--top-k", 1, "--tokens", 60, "--prompt", "the ")) in texts


def test_bf16_is_said_and_the_text_is_much_the_same(here: Path) -> None:
    exact = text_of(sample("--precision", "fp32", "--temperature", 0, "--tokens", 12, "--prompt", "the king and "))
    rough = text_of(sample("--precision", "bf16", "--temperature", 0, "--tokens", 12, "--prompt", "the king and "))
    assert rough[:16] == exact[:16]
    assert text_of(sample("--precision", "bf16", "--seed", 5)) == text_of(sample("--precision", "bf16", "--seed", 5))


def test_a_model_that_gains_from_bf16_gets_it_and_stderr_says_so(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigpt_cli.core.runtime.HALF_FROM_PARAMETERS", 100)
    monkeypatch.setattr("minigpt_cli.core.processor.bf16_instructions", lambda: "AMX")
    done = sample("--seed", 5)
    assert (done.code, done.err) == (0, "precision: bf16, weights of half the size are read in half the time\n")
    assert done.out == text_of(sample("--seed", 5, "--precision", "bf16"))
    assert sample("--seed", 5).out == done.out
    assert text_of(sample("--show-probs", "--seed", 5)) == text_of(
        sample("--show-probs", "--seed", 5, "--precision", "fp32")
    )


def test_a_seed_repeats_the_text_and_without_one_it_is_new(here: Path) -> None:
    assert text_of(sample("--seed", 5)) == text_of(sample("--seed", 5))
    assert text_of(sample("--seed", 5)) != text_of(sample("--seed", 6))
    assert text_of(sample()) != text_of(sample())


def test_several_samples_are_separated_by_a_line_of_their_own(here: Path) -> None:
    texts = text_of(sample("--num-samples", 3, "--seed", 1, "--tokens", 30, "--prompt", "the ")).split("\n---\n")
    assert len(texts) == len(set(texts)) == 3
    assert all(text.startswith("the ") and len(text) == 34 for text in texts)
    greedy = text_of(sample("--num-samples", 2, "--temperature", 0, "--tokens", 30)).split("\n---\n")
    assert greedy == [text_of(sample("--temperature", 0, "--tokens", 30))] * 2


def test_the_prompt_from_a_file_or_from_stdin(here: Path) -> None:
    (here / "prompt.txt").write_bytes(b"\xef\xbb\xbfthe king\n")
    expected = text_of(sample("--prompt", "the king\n", "--temperature", 0))
    assert text_of(sample("--prompt-file", "prompt.txt", "--temperature", 0)) == expected
    assert text_of(sample("--prompt-file", "-", "--temperature", 0, stdin=b"the king\n")) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens 0: ask for at least 1"),
        (["--tokens", "-3"], "--tokens -3"),
        (["--temperature", "-1"], "--temperature -1.0: 0 (always the likeliest) or more"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--temperature", "inf"], "--temperature inf"),
        (["--top-k", "0"], "--top-k 0: at least 1"),
        (["--top-p", "0"], "--top-p 0.0: above 0, at most 1"),
        (["--top-p", "1.01"], "--top-p 1.01"),
        (["--top-p", "nan"], "--top-p nan"),
        (["--num-samples", "0"], "--num-samples 0: at least 1"),
        (["--seed", "-1"], "--seed -1"),
        (["--stop", ""], "--stop: the text to stop at is empty"),
        (["--prompt", "a", "--prompt-file", "b"], "--prompt and --prompt-file: choose one"),
        (["--show-probs", "--num-samples", "2"], "--show-probs shows one sample"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["--prompt-file", "."], ".: Is a directory"),
        (["--prompt-file", "latin1.txt"], "latin1.txt: not UTF-8 text (byte 1)"),
        (["--prompt", "the kıng!"], "not in the vocabulary of 26 characters: '!' (U+0021), 'ı' (U+0131)"),
        (["--prompt", "\x1b[2J"], "U+001B"),
        (["--device", "cuda:99"], "device cuda:99 was asked for"),
        (["--device", "gpu"], "sample: device: should be auto, cpu, cuda, cuda:N or mps, not 'gpu'"),
        (["--precision", "int8"], "sample: precision: should be 'auto', 'fp32', 'bf16' or 'fp16', not 'int8'"),
        (["--device", "cpu", "--precision", "fp16"], "precision fp16 needs a GPU; on a CPU use bf16 or fp32"),
    ],
)
def test_arguments_that_are_wrong(here: Path, arguments: list[str], message: str) -> None:
    (here / "latin1.txt").write_bytes(b"k\xe4se")
    done = sample(*arguments)
    assert done.code == 2
    assert message in done.error


def test_a_wrong_argument_through_the_real_command(here: Path) -> None:
    done = run("sample", "--ckpt", BEST, "--tokens", "0")
    assert (done.code, done.error) == (2, "minigpt: error: --tokens 0: ask for at least 1\n")


def test_top_k_above_the_vocabulary_is_clamped_and_said(here: Path) -> None:
    done = sample("--top-k", 500, "--seed", 1)
    assert done.code == 0
    assert done.err == "--top-k 500 is more than the vocabulary: all 26 tokens are allowed\n"
    assert done.out == text_of(sample("--seed", 1))


def test_a_prompt_longer_than_the_context_is_cropped_and_said(here: Path) -> None:
    prompt = "the king and queen of the winter"
    done = sample("--prompt", prompt, "--tokens", 9, "--temperature", 0)
    assert done.code == 0
    assert done.err == "the prompt has 32 tokens and the context 16: only its newest 16 count\n"
    assert done.out.startswith(prompt)
    assert done.out[32:] == text_of(sample("--prompt", prompt[-16:], "--tokens", 9, "--temperature", 0))[16:]


def test_exact_window_recomputes_the_newest_window_for_every_token(here: Path) -> None:
    saved = checkpoint.load(BEST)
    model, ids = saved.model().eval(), saved.tokenizer.encode("the king").tolist()
    for _ in range(60):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids[-16:]]))[0, -1].argmax()))
    exact = sample("--prompt", "the king", "--tokens", 60, "--temperature", 0, "--exact-window")
    assert text_of(exact) == saved.tokenizer.decode(ids)


def test_past_the_window_the_newest_half_is_read_again(here: Path) -> None:
    saved = checkpoint.load(BEST)
    model, ids = saved.model().eval(), saved.tokenizer.encode("the king").tolist()
    begin = 0
    for _ in range(60):
        if len(ids) - begin > 16:
            begin = len(ids) - 8
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids[begin:]]))[0, -1].argmax()))
    assert text_of(sample("--prompt", "the king", "--tokens", 60, "--temperature", 0)) == saved.tokenizer.decode(ids)


# --- stop ---


def test_the_text_ends_before_the_stop_text(here: Path) -> None:
    whole = text_of(sample("--prompt", "the ", "--seed", 1, "--tokens", 200))
    for stop in (whole[90:91], whole[90:93], whole[30:120]):
        stopped = text_of(sample("--prompt", "the ", "--seed", 1, "--tokens", 200, "--stop", stop))
        assert stopped == "the " + whole[4 : whole.index(stop, 4)]
    assert text_of(sample("--prompt", "the ", "--seed", 1, "--tokens", 200, "--stop", "zzz")) == whole


def test_every_stop_that_is_given_counts(here: Path) -> None:
    whole = text_of(sample("--prompt", "the ", "--seed", 1, "--tokens", 200))[4:]
    first, second = whole[60:63], whole[20:23]
    at = min(whole.index(first), whole.index(second))
    for stops in ([first, second], [second, first], ["zzz", first, second, "zzz"]):
        options = [word for stop in stops for word in ("--stop", stop)]
        assert text_of(sample("--prompt", "the ", "--seed", 1, "--tokens", 200, *options))[4:] == whole[:at]
        model = load(BEST, device="cpu")
        assert generate(model, "the ", seed=1, tokens=200, stop=stops) == whole[:at]
    shown = text_of(sample("--show-probs", "--seed", 1, "--tokens", 200, "--stop", "zzz", "--stop", "e")).splitlines()
    assert shown[-1].startswith("'e' ")
    assert "--stop: the text to stop at is empty" in sample("--stop", "a", "--stop", "").error


def test_every_sample_has_its_own_stop(here: Path) -> None:
    arguments = ["--num-samples", 3, "--seed", 1, "--tokens", 80]
    whole = text_of(sample(*arguments)).split("\n---\n")
    assert text_of(sample(*arguments, "--stop", "e")).split("\n---\n") == [text.partition("e")[0] for text in whole]


# --- characters ---


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_text_is_exact_in_a_pipe_and_safe_on_a_terminal(polyglot: Path, kind: str) -> None:
    arguments = ["sample", "--ckpt", polyglot / kind / "last.safetensors", "--prompt", "Zeile eins", "--temperature", 0]
    text = text_of(call(*arguments, "--tokens", 200))
    assert "über 東京 😀\r\nund zwei \x1b[31mrot\x1b[0m\tTab\x07\r\n" in text
    assert text_of(call(*arguments, "--tokens", 200, "--raw")) == text
    code, shown = on_a_terminal(*arguments, "--tokens", 200)
    assert code == 0
    assert not set(shown) & {"\x1b", "\x07"}
    as_it_is = shown.replace("\\x1b", "\x1b").replace("\\x07", "\x07")
    assert as_it_is.replace("\r", "") == text.replace("\r", "") + "\n"  # the terminal adds some of its own
    code, shown = on_a_terminal(*arguments, "--tokens", 200, "--raw")
    assert (code, "\x1b[31mrot" in shown) == (0, True)


SIGNS = "\x0c\u200f\r\n\t\x1b\x00é\u05e9\u20ac😀\ufeff\u2028x"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """chars.safetensors, which writes all of SIGNS in any order; bytes.safetensors, which writes any bytes."""
    folder = tmp_path_factory.mktemp("untrained")
    for kind, name in (("char", "chars"), ("byte", "bytes")):
        tokenizer = CharTokenizer("".join(sorted(SIGNS))) if kind == "char" else ByteTokenizer()
        torch.manual_seed(3)
        model = GPT(parse_config({"model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8}}, "").model,
                    tokenizer.vocab_size)  # fmt: skip
        header = {
            "config": {"model": model.config.model_dump()}, "tokenizer": tokenizer.to_json(), "step": 0,
            "tokens_seen": 0, "val_loss": None, "dataset_fingerprint": "", "progress": checkpoint.Progress(),
        }  # fmt: skip
        weights = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
        checkpoint.save(folder / f"{name}.safetensors", weights, header)
    return folder


LOCALES: list[dict[str, str]] = [
    {},
    {"PYTHONIOENCODING": "cp1252"},
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.parametrize("locale", LOCALES, ids=str)
@pytest.mark.parametrize("name", ["chars", "bytes"])
def test_a_file_holds_what_the_model_wrote_byte_for_byte(
    untrained: Path, tmp_path: Path, name: str, locale: dict[str, str]
) -> None:
    path = untrained / f"{name}.safetensors"
    expected = "x" + generate(load(path, device="cpu"), "x", tokens=600, seed=4)
    assert set(SIGNS if name == "chars" else "\x0c\r\n\x1b\x00\ufffd") <= set(expected)
    assert re.search("\r(?!\n)", expected)
    arguments = ("sample", "--ckpt", path, "--prompt", "x", "--tokens", 600, "--seed", 4, "--device", "cpu")
    with open(tmp_path / "text", "wb") as file:
        done = subprocess.run(command(*arguments), env=environment(**locale), stdout=file, stderr=subprocess.PIPE)
    assert done.returncode == 0
    assert (tmp_path / "text").read_bytes() == expected.encode()
    if not locale:
        assert run(*arguments).out == expected  # a pipe


def test_a_terminal_that_has_no_such_letter_has_it_spelled_out(untrained: Path) -> None:
    arguments = ("sample", "--ckpt", untrained / "chars.safetensors", "--tokens", 300, "--seed", 4)
    code, shown = on_a_terminal(*arguments, PYTHONIOENCODING="cp1252")
    assert (code, shown.isascii()) == (0, False)  # é and the euro sign are in cp1252


@pytest.mark.parametrize("kind", ["byte", pytest.param("bpe", marks=pytest.mark.slow)])
def test_characters_of_many_bytes_are_written_whole(polyglot: Path, kind: str) -> None:
    """Read as it comes: what has been written at any moment is whole UTF-8."""
    child = subprocess.Popen(
        command("sample", "--ckpt", polyglot / kind / "last.safetensors", "--tokens", 400, "--temperature", 0),
        env=environment(), stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    text = ""
    while piece := os.read(child.stdout.fileno(), 1 << 16):
        text += piece.decode()  # raises at half a character
    assert child.wait(timeout=PATIENCE) == 0
    assert all(c in text for c in "東京😀ü")
    assert "\ufffd" not in text


def test_half_a_character_at_the_end_becomes_a_replacement_character(polyglot: Path) -> None:
    arguments = ["sample", "--ckpt", polyglot / "byte/last.safetensors", "--prompt", "eins über "]
    assert text_of(call(*arguments, "--temperature", 0, "--tokens", 1)).endswith("über \ufffd")
    assert text_of(call(*arguments, "--temperature", 0, "--tokens", 3)).endswith("über 東")


# --- probabilities ---


def test_show_probs_gives_the_probabilities_of_the_model(here: Path) -> None:
    saved = checkpoint.load(BEST)
    model, tokenizer = saved.model().eval(), saved.tokenizer
    prompt = "the king"
    lines = text_of(sample("--prompt", prompt, "--tokens", 8, "--show-probs", "--seed", 2, "--top-k", 9)).splitlines()
    assert lines[0] == prompt
    assert len(lines) == 9
    ids = tokenizer.encode(prompt).tolist()
    for line in lines[1:]:
        with torch.no_grad():
            probs = model(torch.tensor([ids]))[0, -1].softmax(dim=0)
        found = re.findall(r"('(?:[^'\\]|\\.)')\s+([\d.]+)%", line)
        chosen, *others = [(eval_char(quoted), float(percent) / 100) for quoted, percent in found]
        token = int(tokenizer.encode(chosen[0])[0])
        assert chosen[1] == pytest.approx(float(probs[token]), abs=6e-5)
        values, places = probs.topk(5)
        assert [char for char, _ in others] == [tokenizer.decode([int(i)]) for i in places]
        assert [p for _, p in others] == pytest.approx(values.tolist(), abs=6e-4)
        ids.append(token)


def eval_char(quoted: str) -> str:
    return quoted[1:-1].encode().decode("unicode_escape")


def test_show_probs_stops_too(here: Path) -> None:
    lines = text_of(sample("--show-probs", "--seed", 1, "--tokens", 200, "--stop", "e")).splitlines()
    assert [line.startswith("'e' ") for line in lines] == [False] * (len(lines) - 1) + [True]


def test_show_probs_of_bytes_and_controls_are_spelled_out(polyglot: Path) -> None:
    done = call(
        "sample", "--ckpt", polyglot / "byte/last.safetensors", "--tokens", 60, "--temperature", 0, "--show-probs"
    )
    assert not {c for c in text_of(done) if ord(c) < 32} - {"\n"}
    assert "'\\x1b'" in done.out
    assert "'\\xe6'" in done.out


def test_colour_only_on_a_terminal(here: Path) -> None:
    arguments = ["sample", "--ckpt", BEST, "--tokens", 3, "--show-probs", "--seed", 1]
    plain = text_of(call(*arguments))
    assert "\x1b" not in plain
    code, shown = on_a_terminal(*arguments)
    assert code == 0
    assert "\x1b[31m" in shown or "\x1b[33m" in shown
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown).replace("\r\n", "\n") == plain


# --- the reader goes away ---


def test_a_closed_pipe_ends_it_quietly(here: Path) -> None:
    words = " ".join(command("sample", "--ckpt", BEST, "--tokens", "1000000"))
    script = f"({words}; echo exit $? >&2) | head -n 1"
    done = subprocess.run(["sh", "-c", script], env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.stderr == "exit 0\n"
    assert len(done.stdout.splitlines()) == 1


def test_ctrl_c_ends_it_quietly(here: Path) -> None:
    child = subprocess.Popen(
        command("sample", "--ckpt", BEST, "--tokens", "1000000"), env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.read(50)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=PATIENCE)
    assert (child.returncode, err) == (130, b"")


# --- files that are no checkpoint, or one with a plan ---


def _newer(path: Path) -> None:
    rewrite(path, lambda document: document | {"format_version": 99})


def _flipped(path: Path, position: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(position * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def _empty_safetensors(path: Path) -> None:
    path.write_bytes((2).to_bytes(8, "little") + b"{}" + b"\0" * 16)


def rewrite(path: Path, change: Callable[[dict[str, object]], dict[str, object]]) -> None:
    """Change the JSON document in a checkpoint's header, checksum and all, as a stranger could."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    layout = json.loads(data[8 : 8 + length])
    document = json.dumps(change(json.loads(layout["__metadata__"]["minigpt"])))
    layout["__metadata__"] = {"minigpt": document, "minigpt_sha256": hashlib.sha256(document.encode()).hexdigest()}
    head = json.dumps(layout).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])


def _torch_pickle(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"model": torch.zeros(3)}, buffer)
    path.write_bytes(buffer.getvalue())


class _Bomb:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda p: p.unlink(), 2, "no such checkpoint"),
        (lambda p: (p.unlink(), p.mkdir()), 2, "not a file"),
        (lambda p: p.write_bytes(b""), 1, "the file is empty"),
        (lambda p: p.write_text("Dear reader,\n" * 9), 1, "not a safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:100]), 1, "cut short"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), 1, "damaged"),
        (lambda p: _flipped(p, 0.0), 1, "not a checkpoint"),
        (lambda p: _flipped(p, 0.1), 1, ""),
        (lambda p: _flipped(p, 1.0), 1, "does not match its checksum"),
        (lambda p: p.write_bytes(pickle.dumps(_Bomb())), 1, "it is a pickle"),
        (_torch_pickle, 1, "it is a pickle (a .pt file?), which minigpt never opens"),
        (_empty_safetensors, 1, "not a minigpt checkpoint"),
        (_newer, 1, "made by a newer minigpt (99); update minigpt"),
        (lambda p: p.write_bytes((1 << 62).to_bytes(8, "little") + b"{" * 99), 1, "not a checkpoint"),
    ],
    ids=["missing", "folder", "empty", "text", "truncated early", "truncated late", "flipped length", "flipped header",
         "flipped tensor", "pickle", "torch pickle", "not ours", "newer", "huge header"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["sample", "eval"])
def test_a_file_that_is_no_checkpoint(
    here: Path, make: Callable[[Path], object], code: int, message: str, name: str
) -> None:
    make(here / BEST)
    done = call(name, "--ckpt", BEST)
    assert done.code == code
    assert done.error.startswith(f"minigpt: error: {BEST}: ")
    assert message in done.error
    assert len(done.err.splitlines()) == 1
    assert not (here / "pwned").exists()


def test_a_damaged_checkpoint_through_the_real_command(here: Path) -> None:
    _flipped(here / BEST, 1.0)
    done = run("sample", "--ckpt", BEST)
    assert done.code == 1
    assert "does not match its checksum" in done.error


EVIL = "\x1b]0;owned\x07\x9b2J\u202e"


def test_metadata_cannot_drive_the_terminal(here: Path) -> None:
    def change(document: dict[str, object]) -> dict[str, object]:
        config = dict(document["config"])  # type: ignore[call-overload]
        config |= {"out_dir": EVIL, "data": {"path": f"nowhere{EVIL}", "sampling": "random"}}
        chars = "\n\x1b" + checkpoint.load(BEST).tokenizer.to_json()["chars"][2:]  # ESC instead of the space
        return document | {"config": config, "tokenizer": {"kind": "char", "chars": chars}}

    rewrite(here / BEST, change)
    (here / f"text{EVIL}.txt").write_text("kingandqueen")
    for arguments in (
        ["sample", "--tokens", 300, "--show-probs"], ["sample", "--prompt", "!"], ["eval"],
        ["eval", "--data", "data/input"], ["eval", "--data", f"text{EVIL}.txt"],
        ["eval", "--data", f"text{EVIL}.txt", "--json"],
    ):  # fmt: skip
        done = call(arguments[0], "--ckpt", BEST, *arguments[1:])
        assert done.code in (0, 2), done.err
        assert not set(done.out + done.err) & set(EVIL[0] + "\x07\x9b\u202e"), arguments
    for words in (["eval", "--data", f"text{EVIL}.txt"], ["sample", "--tokens", "300"]):
        code, shown = on_a_terminal(words[0], "--ckpt", BEST, *words[1:])
        assert code == 0
        assert "\x1b]0;" not in shown
        assert "\x07" not in shown
        assert words[0] == "eval" or ("\\x1b" in shown and "\x1b" not in shown)


def test_a_setting_of_nonsense_in_the_metadata_is_a_damaged_file(here: Path) -> None:
    def change(document: dict[str, object]) -> dict[str, object]:
        return document | {"config": {"model": {"n_layer": EVIL}}}

    rewrite(here / BEST, change)
    done = sample()
    assert done.code == 1
    assert "damaged" in done.error


def test_help_says_what_happens_past_the_window_and_between_samples() -> None:
    shown = " ".join(call("sample", "--help").out.split())
    assert "a model with rotary positions forgets its oldest token for each new one" in shown
    assert "learned positions cannot slide, so the newest half is kept" in shown
    assert "a line --- stands between them" in shown
