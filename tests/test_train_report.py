"""What a run tells, by hand: FLOPs, lines, what is forgotten when steps are taken again, TensorBoard, curves."""

import json
import sys
import types

from cache_harness import MIXED, PLAIN, WINDOW

from train.report import METRICS, Report, draw_curves, peak_flops, read_metrics, step_flops

LINE = {"loss": 2.5, "tokens": 64.0}


def report(out, **options):
    defaults = dict(steps=4, start=0, flops=1e9, peak=None, quiet=False, tensorboard=False)
    return Report(str(out), **(defaults | options))


def test_flops_by_hand():
    """6 per trained parameter and token, 4 per frozen one; attention adds 2 products of N H per seen key, thrice, half of
    a square."""
    assert step_flops(PLAIN, trained=1000, frozen=0, tokens=10, sequence=64, memory=0) == 10 * (
        6 * 1000 + 6 * 32 * (64 + 64)
    )
    assert step_flops(MIXED, trained=300, frozen=700, tokens=10, sequence=64, memory=0) == 10 * (
        6 * 300 + 4 * 700 + 6 * 32 * (64 + WINDOW)
    )
    device = types.SimpleNamespace(device_kind="TPU v5e")
    assert peak_flops([device] * 4) == 4 * 197e12
    assert peak_flops([types.SimpleNamespace(device_kind="abacus")]) is None


def test_lines_on_standard_error_and_in_the_file(tmp_path, capsys):
    told = report(tmp_path, peak=1e15)
    for step in (1, 2, 3, 4):
        told.step(step, LINE, write=step % 2 == 0)
    told.validation(4, 1.5, 2.25, "ab\ncd")
    told.close()
    lines = read_metrics(str(tmp_path))
    assert [line["step"] for line in lines] == [2, 4, 4] and lines[2]["sample"] == "ab\ncd"
    assert lines[1]["loss"] == 2.5 and 0 < lines[1]["mfu"] and lines[1]["tokens_per_second"] > 0
    said = capsys.readouterr().err
    assert "step 4/4  loss 2.5000" in said and "MFU" in said and "left 0:00:00" in said
    assert "validation loss 1.5000, 2.2500 bits per byte\n  | ab\n  | cd\n" in said


def test_steps_that_are_taken_again_are_forgotten(tmp_path, capsys):
    """As is a line that a crash cut short."""
    (tmp_path / METRICS).write_text(
        "".join(json.dumps({"step": n, "loss": n}) + "\n" for n in range(1, 6)) + '{"step": 6, "lo'
    )
    told = report(tmp_path, start=3, quiet=True)
    told.step(4, LINE, write=True)
    told.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(str(tmp_path))] == [(1, 1), (2, 2), (3, 3), (4, 2.5)]
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    told = report(tmp_path)
    for step in (1, 2, 3, 4):
        told.step(step, LINE, write=True)
    told.say("a line beside it")
    told.close()
    said = capsys.readouterr().err
    assert "4/4" in said and "loss 2.5000" in said and "a line beside it\n" in said


def test_tensorboard(tmp_path, monkeypatch):
    calls = []
    writer = types.SimpleNamespace(add_scalar=lambda *args: calls.append(args), close=lambda: calls.append("closed"))
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=lambda folder: writer))
    told = report(tmp_path, tensorboard=True, quiet=True)
    told.step(1, LINE, write=True)
    told.close()
    assert ("loss", 2.5, 1) in calls and calls[-1] == "closed"


def test_curves(tmp_path, monkeypatch):
    lines = [{"step": n, "loss": 1 / n} for n in range(1, 30)] + [{"step": 29, "validation_loss": 0.1}]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert draw_curves(str(tmp_path)) == f"curves in {tmp_path}/curves.png"
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_curves(str(tmp_path)) == "no curves: matplotlib is not installed"
