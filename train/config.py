"""A recipe: all that decides what a run does, typed and frozen.

RECIPE = Recipe(model=Model(...), data=Data(...), ...)          train/recipes/NAME.py, or any file of yours
python -m train NAME --steps 100 --optimizer.weight_decay 0     every field by its path
"""

import dataclasses
import difflib
import importlib
import importlib.util
import pathlib
import pkgutil

from jaxkv.config import ACTIVATIONS, DecoderConfig, LayerConfig, RcmhaConfig, RopeConfig, SsaConfig


class TrainError(ValueError):
    """A run cannot be started or go on; the message says what was given, what is accepted, and the fix."""


def _positive(config, *names):
    for name in names:
        if getattr(config, name) is not None and getattr(config, name) <= 0:
            raise TrainError(f"{name} must be positive, got {getattr(config, name)}")


def _not_negative(config, *names):
    for name in names:
        if getattr(config, name) < 0:
            raise TrainError(f"{name} must not be negative, got {getattr(config, name)}")


def _one_of(name, value, accepted):
    if value not in accepted:
        raise TrainError(f"{name} {value!r} is not known; accepted: {', '.join(map(str, accepted))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rcmha:
    """`jaxkv.config.RcmhaConfig` of a recipe, in which distances None with a relative term is as far as the model sees."""

    relative: str = "learned"
    distances: int | None = None
    convolution: str = "shared"
    width: int = 3
    query_context: str = "memory"

    def of(self, far: int) -> RcmhaConfig:
        """The model's, whose queries see keys at distances below `far`."""
        own = dataclasses.asdict(self)
        if self.relative != "none" and self.distances is None:
            own["distances"] = far
        return RcmhaConfig(**own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """base: a checkpoint to go on from (name, directory, .gguf file, Hugging Face id); the shape is then its own.

    Else a Llama of this shape, with random parameters: vocab_size None is the tokenizer's. head_dim None:
    hidden_size / num_heads; num_kv_heads None: num_heads. window: of all layers; None = all earlier tokens. rope: "default"
    or "none"; learned_positions: length of a table of positions. activation, mlp_gate: of the MLP. attention: "gqa"; "ssa",
    which has the temperatures of `ssa` (arXiv 2411.12892); or "rcmha", which has the convolution and the relative term of
    `rcmha` (arXiv 2308.03429; its distances None: max_positions, or the window). None: the base checkpoint's, else "gqa". A
    plain base starts near the model that it is (`from_gqa` of `jaxkv.attention.ssa` and `.rcmha`); what is added to it is
    */*_temperature/*, */*_convolution/* and */distances/*. The arms of RCMHA's comparison, rope "none" in all:

        MHA    learned_positions                     RMHA   attention "rcmha", rcmha.convolution "none"
        MDHA   attention "rcmha", rcmha.relative     RCMHA  attention "rcmha"
               "none", learned_positions
    """

    base: str | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_positions: int | None = None
    window: int | None = None
    rope: str = "default"
    rope_theta: float = 10_000.0
    learned_positions: int | None = None
    activation: str = "silu"
    mlp_gate: bool = True
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qk_norm: bool = False
    attention: str | None = None
    ssa: SsaConfig = SsaConfig()
    rcmha: Rcmha = Rcmha()

    def __post_init__(self):
        _one_of("model.attention", self.attention, (None, "gqa", "ssa", "rcmha"))
        _one_of("model.rope", self.rope, ("default", "none"))
        _one_of("model.activation", self.activation, ACTIVATIONS)
        for name, usual in (("ssa", SsaConfig()), ("rcmha", Rcmha())):
            if self.attention != name and getattr(self, name) != usual:
                raise TrainError(f"model.{name} is given, but model.attention is {self.attention!r}; make it {name!r}")
        shape = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "max_positions")
        sizes = (*shape, "vocab_size", "num_kv_heads", "head_dim", "window", "learned_positions")
        if self.base is None:
            missing = [name for name in shape if getattr(self, name) is None]
            if missing:
                raise TrainError(f"a model without a base checkpoint needs model.{missing[0]}")
        given = [name for name in sizes if self.base is not None and getattr(self, name) is not None]
        if given:
            raise TrainError(f"model.{given[0]} is that of the base checkpoint {self.base!r}; give one of the two")
        usual = {"rope": "default", "activation": "silu", "mlp_gate": True}
        given = [name for name in usual if self.base is not None and getattr(self, name) != usual[name]]
        if given:
            raise TrainError(f"model.{given[0]} is that of the base checkpoint {self.base!r}; leave it out")
        _positive(self, *sizes, "rope_theta", "norm_eps")
        if self.base is None and self.head_dim is None and self.hidden_size % self.num_heads:
            raise TrainError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}; give head_dim"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """train, validation: each a text file, a .jsonl file (one document per line, its text in `field`), a name of
    `infer.texts`, hf:ID[:CONFIG]:SPLIT (the `datasets` library), or what needs no file (`train.sources`): python-library, the
    source of the standard library; retrieval:COUNT[:SEED], texts with facts, questions and answers, as `jaxkv evaluate` asks.
    No validation: validation_share of the training text, its end. tokenizer: "bytes", "characters", "bpe:SIZE" (trained on the
    training text), "base" (the base checkpoint's), or a directory with tokenizer.json. whole: windows end where documents end,
    at the cost of padding."""

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    validation_share: float = 0.1
    tokenizer: str = "base"
    field: str = "text"
    whole: bool = False

    def __post_init__(self):
        if not self.train:
            raise TrainError("data.train names no text; give at least one")
        if not 0 <= self.validation_share < 1:
            raise TrainError(f"data.validation_share must be at least 0 and below 1, got {self.validation_share}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (arXiv 1711.05101). Weight decay is for matrices only, and not for those that `no_decay` matches: temperatures,
    filters, biases and tables of distances, whose start at zero or at the identity says nothing of their size. groups:
    rates of their own, as (pattern, factor of the rate); the first pattern that a parameter's path matches counts.
    frozen: patterns of paths that are not trained. Patterns are shell globs over paths such as
    layers_3/attention/qkv/kernel."""

    learning_rate: float
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip: float | None = 1.0
    groups: tuple[tuple[str, float], ...] = ()
    frozen: tuple[str, ...] = ()
    no_decay: tuple[str, ...] = ("*_temperature/*", "*_convolution/*", "*/distances/*bias", "*/distances/table")

    def __post_init__(self):
        _positive(self, "learning_rate", "eps", "clip")
        _not_negative(self, "weight_decay")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainError(f"optimizer.{name} must be at least 0 and below 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over the steps (`train.optimizer.SCHEDULES`): warmup steps up to the rate, then by its name to
    `end` times the rate. decay: steps of the last part of "wsd"."""

    name: str = "cosine"
    warmup: int = 0
    end: float = 0.1
    decay: int | None = None

    def __post_init__(self):
        _not_negative(self, "warmup", "end")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """dtype: of the forward pass; parameters and sums are float32. remat: what the backward pass computes again: "none",
    "block" (all but each block's input), "dots" (all but the products with parameters). loss_tokens: of a batch, so many
    have their logits in memory at a time. accumulation: a batch is run in so many parts. data, fsdp, tensor: the mesh; one
    number may be 0, all devices that are left."""

    dtype: str = "float32"
    remat: str = "block"
    loss_tokens: int = 4096
    accumulation: int = 1
    data: int = 0
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        _one_of("compute.dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("compute.remat", self.remat, ("none", "block", "dots"))
        _positive(self, "loss_tokens", "accumulation")
        _not_negative(self, "data", "fsdp", "tensor")
        if (self.data, self.fsdp, self.tensor).count(0) > 1:
            raise TrainError("of compute.data, compute.fsdp and compute.tensor only one may be 0 (what is left)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685) on the kernels whose paths match; rank 0: none, the parameters themselves are
    trained. The adapter adds alpha / rank * A B."""

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("*/attention/*/kernel",)

    def __post_init__(self):
        _not_negative(self, "rank")
        _positive(self, "alpha")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """A checkpoint every so many steps, and at the end; the newest `keep` and the best by validation loss stay."""

    every: int = 500
    keep: int = 2

    def __post_init__(self):
        _positive(self, "every", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Every so many steps (0: never but at the end) the loss of `batches` validation batches, and a sample: `tokens` new
    ones after `prompt`, from a cache of `cache` and `budget`. tokens 0: no sample."""

    every: int = 500
    batches: int = 20
    prompt: str = "\n"
    tokens: int = 0
    temperature: float = 0.8
    cache: str = "full"
    budget: str | None = None

    def __post_init__(self):
        _not_negative(self, "every", "tokens", "temperature")
        _positive(self, "batches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logging:
    """metrics.jsonl gets a line every so many steps. tensorboard, curves: also write those (tensorboardX, matplotlib)."""

    every: int = 10
    tensorboard: bool = False
    curves: bool = True

    def __post_init__(self):
        _positive(self, "every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run. batch: sequences per step, over all devices and parts. sequence: tokens each. memory: so many tokens before its
    sequence a row sees too, without gradients (`jaxkv.causal`), and each row reads on where it was; 0: none. z_loss: weight
    of the squared log-normalizer (PaLM, arXiv 2204.02311, uses 1e-4). out: the run's folder."""

    model: Model
    data: Data
    optimizer: Optimizer
    steps: int
    batch: int
    sequence: int
    out: str
    schedule: Schedule = Schedule()
    compute: Compute = Compute()
    lora: Lora = Lora()
    checkpoints: Checkpoints = Checkpoints()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
    memory: int = 0
    z_loss: float = 0.0
    seed: int = 0

    def __post_init__(self):
        _positive(self, "steps", "batch", "sequence")
        _not_negative(self, "memory", "z_loss", "seed")
        if self.batch % self.compute.accumulation:
            raise TrainError(
                f"batch {self.batch} is not a multiple of compute.accumulation {self.compute.accumulation}"
            )
        if self.memory and self.data.whole:
            raise TrainError(
                "a memory is of rows that read on, and data.whole puts texts where they fit; leave out one"
            )
        if self.model.base is None and self.sees > self.model.max_positions:
            raise TrainError(
                f"{self.seeing} is longer than model.max_positions {self.model.max_positions}; raise one or lower the other"
            )
        if self.model.base is None and self.data.tokenizer == "base":
            raise TrainError(
                "data.tokenizer 'base' needs model.base; accepted: bytes, characters, bpe:SIZE, a directory"
            )
        if self.lora.rank and self.model.base is None:
            raise TrainError("lora.rank needs model.base: adapters on random parameters would learn nothing useful")
        added = {"ssa": "temperatures", "rcmha": "convolutions and tables"}
        if self.lora.rank and self.model.attention in added:
            raise TrainError(
                f"adapters do not reach the {added[self.model.attention]} of model.attention {self.model.attention!r}; leave"
                " out lora.rank, and name in optimizer.frozen what is not to be trained"
            )
        known = [self.model.learned_positions, self.model.rcmha.distances if self.model.window is None else None]
        table = min((n for n in known if n is not None), default=None)
        if table is not None and self.sees > table:
            raise TrainError(f"{self.seeing} is longer than the model's table of {table}; lower it")

    @property
    def sees(self) -> int:
        """Tokens that the last one of a sequence may see, itself included."""
        return self.memory + self.sequence

    @property
    def seeing(self) -> str:
        """The same in words."""
        return f"sequence {self.sequence}" + (f" behind a memory of {self.memory}" if self.memory else "")


def _rcmha(model: Model) -> RcmhaConfig | None:
    if model.attention != "rcmha":
        return None
    return model.rcmha.of(min(model.max_positions, model.window or model.max_positions))


def decoder_config(model: Model, vocab_size: int) -> DecoderConfig:
    """The decoder of a model without a base."""
    size = model.head_dim or model.hidden_size // model.num_heads
    rope = RopeConfig(kind=model.rope, theta=model.rope_theta, rotary_dim=size)
    family = "qwen3" if model.qk_norm else "llama" if model.window is None else "mistral"
    try:
        return DecoderConfig(
            model_type=family, vocab_size=vocab_size, hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size, num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads or model.num_heads, head_dim=size,
            layers=(LayerConfig(window=model.window, rope=rope),) * model.num_layers, max_positions=model.max_positions,
            norm_eps=model.norm_eps, norm_offset=0.0, activation=model.activation, query_scale=size**-0.5, embedding_scale=1.0,
            tie_embeddings=model.tie_embeddings, qk_norm=model.qk_norm, attention=model.attention or "gqa",
            ssa=model.ssa if model.attention == "ssa" else None, mlp_gate=model.mlp_gate,
            learned_positions=model.learned_positions, rcmha=_rcmha(model),
        )  # fmt: skip
    except ValueError as error:
        raise TrainError(f"model: {error}") from error


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    from train import recipes as folder

    return sorted(module.name for module in pkgutil.iter_modules(folder.__path__))


def find_recipe(name: str) -> tuple[Recipe, str]:
    """The recipe and its description, by a name of `recipes()` or by the path of a Python file (which is run)."""
    if name.endswith(".py"):
        path = pathlib.Path(name)
        if not path.is_file():
            raise TrainError(f"recipe {name} does not exist; give a file, or one of: {', '.join(recipes())}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    elif name.replace("-", "_") in recipes():
        module = importlib.import_module("train.recipes." + name.replace("-", "_"))
    else:
        raise TrainError(
            f"recipe {name!r} does not exist{nearest(name, recipes())}; known: {', '.join(recipes())}, or a .py file"
        )
    if not isinstance(getattr(module, "RECIPE", None), Recipe):
        raise TrainError(f"recipe {name} has no RECIPE = train.config.Recipe(...)")
    return module.RECIPE, module.__doc__ or ""


def nearest(name: str, known) -> str:
    """ "; did you mean ...", or nothing."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""
