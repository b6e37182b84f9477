"""From a recipe to all that a run needs, every refusal included: nothing is compiled or written here."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxkv.attention import rcmha, ssa
from jaxkv.causal import empty_memory, why_no_memory
from jaxkv.checkpoints import Checkpoint, Generation, Tokenizer, load_tokenizer, open_checkpoint
from jaxkv.checkpoints.huggingface_config import config_to_json
from jaxkv.config import DecoderConfig
from jaxkv.decoder import init_params
from jaxkv.types import Memory
from train.checkpoint import TOKENIZER, open_run
from train.config import Recipe, TrainError, decoder_config
from train.data import Windows, check_vocabulary, load_texts, make_corpus, make_tokenizer
from train.lora import make_adapters
from train.optimizer import flatten, make_optimizer, make_schedule, split_frozen
from train.sharding import check_batch, check_heads, make_mesh, make_spread, state_shardings
from train.step import Plan, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run before its first step. base: the parameters it goes on from, by path, on the host; None = random ones.

    validation: None if there is no validation text. bytes_per_token: of that text. data: fingerprint of the training
    tokens. shapes: a `TrainState` of shapes with shardings. resumes: whether the folder holds this run already.
    """

    recipe: Recipe
    config: DecoderConfig
    tokenizer: Tokenizer
    generation: Generation
    windows: Windows
    validation: Windows | None
    bytes_per_token: float
    data: str
    base: dict[str, Any] | None
    mesh: Mesh
    plan: Plan
    schedule: optax.Schedule
    shapes: TrainState
    resumes: bool


def prepare(recipe: Recipe, devices=None) -> Prepared:
    """Reads texts and checkpoint, and checks that all fits together.

    Args: devices: of the mesh; None = all of this process's kind.
    Raises: TrainError, CheckpointError, infer.texts.TextError; ValueError for an unknown cache or budget.
    """
    resumes = open_run(recipe)
    _check_optional(recipe)
    mesh = make_mesh(recipe.compute, jax.devices() if devices is None else devices)
    check_batch(mesh, recipe.batch, recipe.compute.accumulation)
    schedule = make_schedule(recipe.schedule, recipe.optimizer.learning_rate, recipe.steps)
    base = None
    if recipe.model.base is not None:
        adapters_only = recipe.lora.rank and not recipe.optimizer.frozen
        base = open_checkpoint(recipe.model.base, dtype=recipe.compute.dtype if adapters_only else "float32")
        if recipe.sees > base.config.max_positions:
            raise TrainError(f"{recipe.seeing} is longer than the base's window, {base.config.max_positions}")
        base = _with_attention(base, recipe)
    training, validating = load_texts(recipe.data)
    tokenizer = _tokenizer(recipe, [*training, *validating], base, resumes)
    config = base.config if base else decoder_config(recipe.model, recipe.model.vocab_size or tokenizer.vocab_size)
    check_heads(mesh, config)
    if recipe.memory and (why := why_no_memory(config)):
        raise TrainError(f"{why}; leave out --memory")
    check_vocabulary(tokenizer, config.vocab_size, exact=base is None)
    corpus = make_corpus(training, tokenizer)
    options = dict(sequence=recipe.sequence, whole=recipe.data.whole, rows=recipe.batch if recipe.memory else None)
    windows = Windows(corpus, seed=recipe.seed, **options)
    validation, bytes_per_token = None, 1.0
    if validating:
        text = make_corpus(validating, tokenizer, what="validation text")
        validation = Windows(text, seed=None, what="validation text", **options)
        bytes_per_token = sum(len(one.encode()) for one in validating) / len(text.tokens)
    _check_sample(recipe, config, tokenizer)
    generation = base.generation if base else Generation(eos_ids=tokenizer.eos_ids)
    config_to_json(config, dtype="float32", generation=generation)  # what cannot be exported is refused now
    flat = {path: np.asarray(x) for path, x in flatten(base.params).items()} if base else None
    shapes, optimizer = _state_shapes(recipe, config, flat, schedule)
    with_places = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, state_shardings(shapes, mesh)
    )
    return Prepared(
        recipe=recipe, config=config, tokenizer=tokenizer, windows=windows, validation=validation,
        generation=generation, bytes_per_token=bytes_per_token,
        data=corpus.fingerprint, base=flat, mesh=mesh, schedule=schedule, shapes=with_places, resumes=resumes,
        plan=Plan(
            config=config, optimizer=optimizer, lora=recipe.lora, dtype=recipe.compute.dtype, remat=recipe.compute.remat,
            loss_tokens=recipe.compute.loss_tokens, z_loss=recipe.z_loss, parts=recipe.compute.accumulation,
            spread=make_spread(mesh),
        ),
    )  # fmt: skip


def _with_attention(base: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The base with the attention that the recipe asks for."""
    asked, given = recipe.model.attention, base.config.attention
    if asked is None or asked == given == "gqa":
        return base
    if given == "gqa":
        key = jax.random.fold_in(jax.random.key(recipe.seed), 1)
        if asked == "ssa":
            params, config = ssa.from_gqa(base.params, base.config, recipe.model.ssa, key)
        else:
            params, config = _convolved(base, recipe, key)
        return dataclasses.replace(base, params=params, config=config)
    raise TrainError(
        f"model.attention {asked!r} cannot be made of the base checkpoint's {given!r}; leave it out to go on with that"
    )


def _convolved(base: Checkpoint, recipe: Recipe, key):
    """A table that is not given a length reaches as far as the base does."""
    far = max(min(base.config.max_positions, kind.window or base.config.max_positions) for kind in base.config.layers)
    try:
        return rcmha.from_gqa(base.params, base.config, recipe.model.rcmha.of(far), key)
    except ValueError as error:
        raise TrainError(f"model: {error}") from error


def _check_optional(recipe: Recipe) -> None:
    if recipe.logging.tensorboard:
        try:
            import tensorboardX  # noqa: F401
        except ImportError as error:
            raise TrainError("logging.tensorboard needs tensorboardX: pip install tensorboardX") from error
    try:
        import grain  # noqa: F401
    except ImportError as error:
        raise TrainError("training needs grain: pip install 'jaxkv[train]'") from error


def _tokenizer(recipe, texts, base, resumes) -> Tokenizer:
    """A run that goes on has the tokenizer that it had."""
    folder = pathlib.Path(recipe.out) / TOKENIZER
    if resumes and (folder / "tokenizer.json").exists():
        return load_tokenizer(folder)
    return make_tokenizer(recipe.data.tokenizer, texts, base.tokenizer if base else None)


def _check_sample(recipe: Recipe, config: DecoderConfig, tokenizer: Tokenizer) -> None:
    from jaxkv.cache.budgets import parse_budget, plan
    from jaxkv.presets import make_preset

    asked = recipe.evaluation
    preset = make_preset(asked.cache)
    parse_budget(asked.budget)
    if not asked.tokens:
        return
    ids = tokenizer.encode(asked.prompt)
    if not ids or tokenizer.decode(ids) != asked.prompt:
        raise TrainError(
            f"evaluation.prompt {asked.prompt!r} has characters that the tokenizer lacks, or none; change it"
        )
    if len(ids) + asked.tokens > config.max_positions:
        raise TrainError(
            f"evaluation.prompt and evaluation.tokens take {len(ids) + asked.tokens} positions, the model has"
            f" {config.max_positions}; lower evaluation.tokens"
        )
    try:
        dtype = recipe.compute.dtype if recipe.lora.rank else "float32"
        plan(config, preset, asked.budget, lengths=[len(ids) + asked.tokens], dtype=dtype)
    except ValueError as error:
        raise TrainError(f"evaluation.cache {asked.cache!r} with evaluation.budget {asked.budget}: {error}") from error


def _state_shapes(recipe, config, flat, schedule):
    """Shapes of the state, and the optimizer of its trained parameters."""
    if flat is None:
        flat = jax.eval_shape(lambda: flatten(init_params(config, jax.random.key(0))))
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    trained, frozen = split(recipe, {path: shape(x) for path, x in flat.items()}, jax.random.key(0))
    optimizer = make_optimizer(recipe.optimizer, schedule, trained)
    shapes = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32), trained=trained, frozen=frozen,
        optimizer=jax.eval_shape(optimizer.init, trained), key=jax.ShapeDtypeStruct((2,), jnp.uint32),
        memory=jax.eval_shape(lambda: _new_memory(recipe, config)),
    )  # fmt: skip
    return shapes, optimizer


def _new_memory(recipe: Recipe, config: DecoderConfig) -> Memory | None:
    if not recipe.memory:
        return None
    return empty_memory(config, rows=recipe.batch, tokens=recipe.memory, dtype=recipe.compute.dtype)


def split(recipe: Recipe, flat, key):
    """(trained, frozen) of a decoder's parameters: with adapters, those alone are trained."""
    if not recipe.lora.rank:
        return split_frozen(flat, recipe.optimizer.frozen)
    if recipe.optimizer.frozen:
        raise TrainError("with lora.rank all parameters but the adapters are frozen; leave out optimizer.frozen")
    abstract = isinstance(next(iter(flat.values())), jax.ShapeDtypeStruct)
    make = lambda: make_adapters(recipe.lora, flat, key)
    return jax.eval_shape(make) if abstract else make(), flat


def first_state(prepared: Prepared) -> TrainState:
    """The state before the first step, on its devices. The only randomness is the recipe's seed."""
    recipe, config, base = prepared.recipe, prepared.config, prepared.base
    places = jax.tree.map(lambda x: x.sharding, prepared.shapes)

    def build(flat):
        start, adapters, key = jax.random.split(jax.random.key(recipe.seed), 3)
        trained, frozen = split(recipe, flatten(init_params(config, start)) if flat is None else flat, adapters)
        return TrainState(
            step=jnp.zeros((), jnp.int32), trained=trained, frozen=frozen,
            optimizer=prepared.plan.optimizer.init(trained), key=jax.random.key_data(key),
            memory=_new_memory(recipe, config),
        )  # fmt: skip

    return jax.jit(build, out_shardings=places)(base)


def first_memory(prepared: Prepared) -> Memory | None:
    """Of rows that have read nothing, on their devices; None for a run without."""
    places = jax.tree.map(lambda x: x.sharding, prepared.shapes.memory)
    return jax.jit(lambda: _new_memory(prepared.recipe, prepared.config), out_shardings=places)()
