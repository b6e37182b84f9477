"""What a run tells: a bar or lines on standard error, metrics.jsonl, TensorBoard, curves."""

import json
import pathlib
import sys
import time

import jax

from jaxkv.config import DecoderConfig

METRICS, CURVES = "metrics.jsonl", "curves.png"
PEAK = {  # of one device, FLOP/s in bfloat16, dense: the makers' data sheets
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12, "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12,
}  # fmt: skip


def step_flops(config: DecoderConfig, *, trained: int, frozen: int, tokens: int, sequence: int, memory: int) -> float:
    """FLOPs of the products of one step, forward and backward, nothing computed twice (PaLM, arXiv 2204.02311, B).

    trained, frozen: parameters of matrices that tokens are multiplied by; frozen ones get no gradient, but hand one on. Half of
    a causal square counts, and attention to a memory in whole; what projects it again is not counted.
    """
    width = config.num_heads * config.head_dim
    seen = sum(min(sequence + 2 * memory, layer.window or sequence + 2 * memory) for layer in config.layers)
    return tokens * (6.0 * trained + 4.0 * frozen + 6.0 * width * seen)


def peak_flops(devices) -> float | None:
    """Of all devices together; None if it is not known."""
    one = PEAK.get(devices[0].device_kind)
    return None if one is None else one * len(devices)


class Report:
    """Collects what steps say. quiet: nothing on standard error. Only the first process writes."""

    def __init__(
        self, out: str, *, steps: int, start: int, flops: float, peak: float | None, quiet: bool, tensorboard: bool
    ):
        self._first = jax.process_index() == 0
        self._folder, self._steps, self._flops, self._peak = pathlib.Path(out), steps, flops, peak
        self._quiet = quiet or not self._first
        self._bar, self._board = None, None
        if self._first:
            _forget_after(self._folder / METRICS, start)
            self._file = (self._folder / METRICS).open("a", encoding="utf-8")
            if tensorboard:
                import tensorboardX

                self._board = tensorboardX.SummaryWriter(str(self._folder / "tensorboard"))
        if not self._quiet and sys.stderr.isatty():
            import tqdm

            self._bar = tqdm.tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)
        self._mark, self._marked, self._tokens, self._start = time.perf_counter(), start, 0.0, start
        self._paused = 0.0

    def stop_clock(self) -> None:
        """What follows is not spent on steps."""
        self._paused = time.perf_counter()

    def restart_clock(self) -> None:
        """Steps go on."""
        self._mark += time.perf_counter() - self._paused

    def step(self, step: int, metrics: dict[str, float], *, write: bool) -> None:
        """Of one step, in order. write: this one gets a line."""
        self._tokens += metrics["tokens"]
        if write:
            now = time.perf_counter()
            seconds = max(now - self._mark, 1e-9)
            rate = (step - self._marked) / seconds
            line = {"step": step, **metrics, "tokens_per_second": self._tokens / seconds}
            if self._peak:
                line["mfu"] = self._flops * rate / self._peak
            self._mark, self._marked, self._tokens = now, step, 0.0
            self._write(line)
            if self._bar is None:
                left = (self._steps - step) / rate
                self.say(f"step {step}/{self._steps}  {_short(line)}  left {_clock(left)}")
            else:
                self._bar.set_postfix_str(_short(line))
        if step == self._start + 1:  # most of it was compilation, which must not count in the next line
            self._mark, self._marked, self._tokens = time.perf_counter(), step, 0.0
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def validation(self, step: int, loss: float, bits: float, sample: str | None) -> None:
        """An evaluation. bits: per byte."""
        line = {"step": step, "validation_loss": loss, "validation_bits_per_byte": bits}
        self._write(line | ({} if sample is None else {"sample": sample}))
        self.say(f"step {step}/{self._steps}  validation loss {loss:.4f}, {bits:.4f} bits per byte")
        if sample is not None:
            self.say("  | " + sample.replace("\n", "\n  | "))

    def say(self, text: str) -> None:
        """A line on standard error, beside the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _write(self, line):
        if not self._first:
            return
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._first:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _short(line) -> str:
    mfu = f", MFU {line['mfu']:.1%}" if "mfu" in line else ""
    return f"loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} tokens/s{mfu}"


def _clock(seconds) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def read_metrics(out: str) -> list[dict]:
    """The lines of metrics.jsonl; one cut short by a crash is left out."""
    found = []
    path = pathlib.Path(out) / METRICS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _forget_after(path: pathlib.Path, step: int) -> None:
    """Takes away what a run that ended without a checkpoint said of steps that will be taken again."""
    from infer.files import replace_file

    if path.exists():
        kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
        replace_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept).encode())


def draw_curves(out: str) -> str:
    """Losses over steps as out/curves.png. Returns: a sentence that says where, or why not."""
    try:
        import matplotlib
    except ImportError:
        return "no curves: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines, path = read_metrics(out), pathlib.Path(out) / CURVES
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, label in (("loss", "training"), ("validation_loss", "validation")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 20 else None)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"curves in {path}"
