"""Tasks, metrics and report of `infer.evaluate`, and a whole evaluation of a tiny random model."""

import builtins
import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infer.evaluate.run as evaluate_run
from infer.evaluate import PROTOCOLS, TASKS, evaluate, load_samples, make_samples, metrics, report
from infer.evaluate.run import _answers
from infer.evaluate.tasks import INTRO, encode_context, split_sentences
from infer.generate import Request, collect, run
from infer.prefill import new_state, read
from infer.sampling import Sampling
from infer.stops import build_stops
from jaxkv.cache import compress
from jaxkv.cache.budgets import plan
from jaxkv.config import DecoderConfig, LayerConfig, RopeConfig
from jaxkv.decoder import init_params
from jaxkv.policies import Full, Scissorhands, make_policy
from jaxkv.presets import Preset, one_tier

FILLER = " ".join(f"Mr. Darcy said number {i} to nobody. “Did he?” It was a {i % 7}th day!" for i in range(400))


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


class Bytes:
    """One token per byte."""

    def encode(self, text):
        return list(text.encode())

    def token_bytes(self):
        return [bytes([i]) for i in range(256)]


class WithChat(Bytes):
    """Bytes, a bos token and a chat template."""

    chat_template, add_bos, bos_id = "{{ template }}", True, 0

    def chat_pieces(self):
        return dataclasses.make_dataclass("Pieces", ["before_user", "after_user"])("<user>\n", "<end>\n<bot>\n")


def samples_of(**changes):
    options = {"filler": FILLER, "tokenizer": Bytes(), "context_tokens": 4000, "samples": 8, "seed": 3} | changes
    return make_samples(options.pop("tasks", ["passkey", "magic"]), **options)


def test_a_long_comparison_forgets_its_programs(monkeypatch):
    """Only where there are more mappings than allowed; programs are then made again."""
    double = jax.jit(lambda x: 2 * x)
    double(jnp.ones(3))
    evaluate_run.spare_mappings()
    assert double._cache_size() == 1
    monkeypatch.setattr(evaluate_run, "MAPPINGS", 1)
    evaluate_run.spare_mappings()
    assert double._cache_size() == 0 and float(double(jnp.ones(3))[0]) == 2.0


def test_samples_are_the_same_every_time_and_differ_by_seed():
    assert samples_of() == samples_of()
    assert samples_of() != samples_of(seed=4)


@pytest.mark.parametrize(
    "tasks, count, contexts", [(["passkey"], 5, 5), (["magic"], 15, 3), (["magic", "passkey"], 9, 9)]
)
def test_number_of_questions_is_per_task_in_all(tasks, count, contexts):
    made = samples_of(tasks=tasks, samples=count)
    assert len(made) == contexts
    for name in tasks:
        per_context = [sum(q.task == name for q in one.questions) for one in made]
        assert sum(per_context) == count
        assert max(per_context) - min(per_context) <= 1


@pytest.mark.parametrize("tokens", [1500, 4000, 9001])
def test_context_is_close_to_and_not_above_its_length(tokens):
    for one in samples_of(context_tokens=tokens):
        assert tokens - 120 < len(one.context.encode()) <= tokens


def test_formats_of_the_facts_and_questions():
    made = samples_of(tokenizer=WithChat(), samples=7)
    depths = []
    for one in made:
        assert one.context.startswith("<user>\n" + INTRO)
        assert len(encode_context(WithChat(), one.context)) <= 4000
        key = re.findall(r"The pass key is (\d{5})\. Remember it\. (\d{5}) is the pass key\.", one.context)
        magic = re.findall(
            r"The special magic number for (\w+) is (\d{4})\. "
            r"Remember it: the special magic number for (\w+) is (\d{4})\.",
            one.context,
        )
        assert len(key) == 1 and len(magic) == 7 and key[0][0] == key[0][1]
        assert all(a == c and b == d for a, b, c, d in magic)
        values = dict((noun, value) for noun, value, _, _ in magic)
        assert len({value[0] for value in [key[0][0], *values.values()]}) == 8
        depths.append(one.context.index("The pass key is") / len(one.context))
        for q in one.questions:
            if q.task == "passkey":
                assert q.question == "\n\nWhat is the pass key?<end>\n<bot>\n"
                assert (q.prefix, q.answer) == ("The pass key is", f" {key[0][0]}")
            else:
                shot = re.fullmatch(r"\n\nThe special magic number for (\w+) is (\d{4})\.", q.question)
                asked = re.fullmatch(r"\n\nThe special magic number for (\w+) is", q.prefix)
                assert values[shot[1]] == shot[2] and q.answer == f" {values[asked[1]]}" and shot[1] != asked[1]
    assert max(depths) - min(depths) > 0.3


def test_sentences_of_any_text():
    assert split_sentences("Mr. Bennet sat.  “Why?” she\nasked. So!") == [
        "Mr. Bennet sat.",
        "“Why?”",
        "she asked.",
        "So!",
    ]
    assert max(len(s.split()) for s in split_sentences("word " * 500)) == 60
    assert samples_of(filler="word " * 3000)
    assert split_sentences("") == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": ["passkey", "quiz"]}, "quiz.*known: passkey, magic"),
        ({"samples": 0}, "at least 1, got 0"),
        ({"filler": "Too short."}, "filler text is too short"),
        ({"context_tokens": 100}, "too short: the facts alone take"),
    ],
)
def test_bad_task_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        samples_of(**changes)


def test_sample_file_round_trip(tmp_path):
    made = samples_of()
    path = tmp_path / "samples.json"
    path.write_text(json.dumps({"contexts": [dataclasses.asdict(one) for one in made]}))
    assert load_samples(path) == made


QUESTION = {"task": "t", "question": "q", "prefix": "", "answer": "a"}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON: line 1"),
        (b"\xff\xfe", "not UTF-8"),
        ([], "object with 'contexts', got list"),
        ({"contexts": []}, "not empty"),
        ({"contexts": [{"id": "1", "questions": [QUESTION]}]}, r"contexts\[0\] must be an object with 'context'"),
        ({"contexts": [{"id": 1, "context": "c", "questions": [QUESTION]}]}, r"contexts\[0\]\.id.*got int 1"),
        (
            {"contexts": [{"id": "1", "context": "c", "questions": [QUESTION | {"answer": ""}]}]},
            r"questions\[0\]\.answer",
        ),
        ({"contexts": [{"id": "1", "context": "c", "questions": ["q"]}]}, r"questions\[0\] must be an object"),
    ],
)
def test_bad_sample_files(tmp_path, content, message):
    path = tmp_path / "bad.json"
    raw = content if isinstance(content, bytes) else content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    with pytest.raises(ValueError, match=message) as error:
        load_samples(path)
    assert "accepted:" in str(error.value) and str(path) in str(error.value)


def test_kl_by_hand():
    full = jnp.log(jnp.asarray([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]], jnp.float32))
    this = (
        jnp.log(jnp.asarray([[0.25, 0.5, 0.25], [0.9, 0.05, 0.05]], jnp.float32)) + 7.0
    )  # logits have a free constant
    np.testing.assert_allclose(metrics.kl(full, this), [0.25 * math.log(2), 0.0], atol=1e-6)
    assert metrics.agree(full, this).tolist() == [False, True]
    np.testing.assert_allclose(
        metrics.nll(this, jnp.asarray([1, 0], jnp.int32)), [math.log(2), -math.log(0.9)], atol=1e-6
    )
    masked = jnp.asarray([0.0, -jnp.inf], jnp.float32)
    assert metrics.kl(masked, jnp.zeros(2)) == pytest.approx(math.log(2))


def test_bits_per_byte():
    assert metrics.bits_per_byte([math.log(2), 3 * math.log(2)], 8) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="at least one byte"):
        metrics.bits_per_byte([], 0)


def test_wilson_against_published_values():
    for right, asked, low, high in ((59, 64, 0.83, 0.97), (64, 64, 0.94, 1.0), (7, 16, 0.23, 0.67), (0, 64, 0.0, 0.06)):
        interval = metrics.wilson(right, asked)
        assert interval == pytest.approx((low, high), abs=0.006)
        assert interval[0] <= right / asked <= interval[1]
    with pytest.raises(ValueError, match="3 of 2"):
        metrics.wilson(3, 2)


def test_mean_interval():
    mean, (low, high) = metrics.mean_interval([1.0, 2.0, 3.0, 4.0])
    assert (mean, low, high) == pytest.approx((2.5, 0.4457, 4.5543), abs=1e-3)
    assert metrics.mean_interval([2.0]) == (2.0, None)
    assert metrics._student(11) == pytest.approx(2.2010, abs=2e-4)
    with pytest.raises(ValueError, match="no values"):
        metrics.mean_interval([])


def rows():
    base = {"share": 1.0, "kl_p99": 0.0, "top1": 1.0, "protocol": PROTOCOLS[0], "batch": 4, "note": ""}
    full = base | {"cache": "full", "budget": "100%", "bytes": 2**20, "kl_mean": 0.0, "bits_per_byte": 1.0} | {
        "accuracy": {"magic": 0.5}, "accuracy_interval": {"magic": [0.2, 0.8]}, "tokens_per_second": 10.0,
        "answers": {"magic": [True, False]}, "kl_interval": None,
    }  # fmt: skip
    bare = {
        "bytes": 2**18,
        "kl_mean": None,
        "kl_p99": None,
        "top1": None,
        "bits_per_byte": None,
        "accuracy": {},
        "answers": {},
    }
    return [full, full | bare | {"cache": "random", "budget": "25%", "tokens_per_second": None, "note": "raised"}]


def test_table_is_aligned_and_shows_what_was_not_measured():
    lines = report.table(rows()).splitlines()
    assert lines[0].split()[:4] == ["cache", "budget", "bytes", "share"]
    assert "50% [20-80]" in lines[2] and "1.0 MiB" in lines[2]
    assert lines[3].split().count("-") == 6
    assert len({len(line) for line in lines[:4]}) == 1
    assert "compress then ask" in lines[5] and lines[-1] == "random 25%: raised"
    assert report.table([]).splitlines()[0].startswith("cache")


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.json"
    report.write_json(rows(), path)
    assert json.loads(path.read_text()) == rows()
    with pytest.raises(ValueError, match="JSON compliant"):
        report.write_json([{"kl_mean": math.nan}], path)
    with pytest.raises(OSError):
        report.write_json(rows(), tmp_path / "absent" / "rows.json")
    assert json.loads(path.read_text()) == rows() and list(tmp_path.iterdir()) == [path]


def test_picture(tmp_path):
    for name, given in (("some.png", rows()), ("none.png", rows()[1:])):
        report.write_picture(given, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


def test_the_pictures_bars():
    full, bare = rows()
    assert report._kl(full) == (report.KL_FLOOR,) * 3 and report._kl(bare) is None
    assert report._kl(full | {"kl_mean": 0.02, "kl_interval": [-0.01, 0.05]}) == (0.02, report.KL_FLOOR, 0.05)
    assert report._right(full) == (0.5, *metrics.wilson(1, 2)) and report._right(bare) is None


def test_picture_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ModuleNotFoundError, match=r"pip install jaxkv\[demo\]"):
        report.write_picture(rows(), tmp_path / "a.png")


@dataclasses.dataclass
class Model:
    config: DecoderConfig
    params: dict
    tokenizer: object


@pytest.fixture(scope="module")
def lm():
    rope = RopeConfig(kind="default", theta=10000.0, rotary_dim=8)
    config = DecoderConfig(
        model_type="llama", vocab_size=256, hidden_size=16, intermediate_size=32, num_heads=4, num_kv_heads=2,
        layers=(LayerConfig(window=None, rope=rope), LayerConfig(window=64, rope=rope)), max_positions=4096,
        head_dim=8, norm_eps=1e-6, norm_offset=0.0, activation="silu",
        query_scale=8**-0.5, embedding_scale=1.0, tie_embeddings=True,
    )  # fmt: skip
    params = jax.tree.map(lambda x: x * 8.0 if x.ndim == 2 else x, init_params(config, jax.random.key(0)))
    return Model(config, params, Bytes())


OPTIONS = {
    "text": FILLER, "caches": ["full", "h2o"], "budgets": ["100%", "25%"], "tasks": ["passkey"],
    "context": 1100, "next_tokens": 12, "excerpts": 2, "samples": 1,
}  # fmt: skip


def test_evaluate(lm):
    calls, kept = [], []
    rows = evaluate(lm, **OPTIONS, progress=lambda *step: calls.append(step), keep=kept.append)
    assert [(row["cache"], row["budget"]) for row in rows] == [
        ("full", "100%"), ("h2o", "100%"), ("h2o", "25%"),
    ]  # fmt: skip
    for row in rows:
        if row["budget"] == "100%":
            assert row["share"] > 2.0  # float32, of a bfloat16 cache
            assert row["kl_p99"] < 1e-5 and row["top1"] == 1.0
            assert row["bits_per_byte"] == pytest.approx(rows[0]["bits_per_byte"], rel=1e-4)
            assert row["accuracy"] == rows[0]["accuracy"]
        else:
            assert row["kl_mean"] > 1e-4 and row["share"] < 0.3 and row["bytes"] < rows[0]["bytes"] * 0.4
        assert row["tokens_per_second"] > 0 and row["batch"] == 2
        assert row["asked"] == {"passkey": 1} and row["protocol"] == PROTOCOLS[0]
        assert len(row["kl_by_excerpt"]) == 2
        assert np.mean(row["kl_by_excerpt"]) == pytest.approx(row["kl_mean"], abs=1e-9)
    assert calls[-1][0] == calls[-1][1] == len(calls)
    assert [len(so_far) for so_far in kept] == [1, 2, 3, 3]  # each case's excerpts, then the only group of contexts
    assert all(row["partial"] for so_far in kept for row in so_far) and not any(row["accuracy"] for row in kept[2])
    assert [row | {"partial": False} for row in kept[-1]] == rows
    report.table(rows)
    json.dumps(rows, allow_nan=False)


def test_seeds_together_say_what_each_says_alone(lm):
    """Each draws its own excerpts, questions and random eviction, whoever else is there."""
    options = OPTIONS | {"caches": ["full", "random", "h2o"], "budgets": ["25%"]}
    both = evaluate(lm, **options, seeds=[0, 3])
    alone = [evaluate(lm, **options, seeds=[seed]) for seed in (0, 3)]
    for row, *ones in zip(both, *alone, strict=True):
        assert row["seeds"] == [0, 3] and [one["seeds"] for one in ones] == [[0], [3]]
        for name in ("kl_mean", "kl_p99", "top1", "perplexity", "bits_per_byte"):
            values = [one[name] for one in ones]
            assert row["by_seed"][name] == pytest.approx(values, rel=1e-3, abs=1e-6)
            assert row[name] == pytest.approx(np.mean(values), rel=1e-3, abs=1e-6)
            assert row["spread"][name] == [min(row["by_seed"][name]), max(row["by_seed"][name])]
        by_excerpt = [value for one in ones for value in one["kl_by_excerpt"]]
        assert row["kl_by_excerpt"] == pytest.approx(by_excerpt, rel=1e-3, abs=1e-6)
        assert row["answers"]["passkey"] == [right for one in ones for right in one["answers"]["passkey"]]
        assert row["asked"] == {"passkey": 2} and row["batch"] == 4
    random = both[1]
    assert random["kl_by_excerpt"][:2] != pytest.approx(random["kl_by_excerpt"][2:], rel=1e-2)
    same = evaluate(lm, **options | {"caches": [make_policy("random", seed=3)]}, seeds=[0])
    assert same[0]["kl_by_excerpt"] == pytest.approx(random["kl_by_excerpt"][:2], rel=1e-3)  # the seed is the run's


def test_a_quantized_cache_is_not_passed_off_as_the_full_one(lm):
    wide = Preset(name="wide", summary="", policy=Full(), parts=one_tier("int8"))
    with pytest.raises(ValueError, match="cache 'wide' quantizes, and the full policy takes no budget"):
        evaluate(lm, **OPTIONS | {"caches": [wide]})


def test_full_cache_equals_the_plain_forward_pass(lm):
    """Bits per byte of the full row against one forward pass over the same excerpt."""
    from infer.evaluate.material import draw_excerpts
    from jaxkv.cache import forward
    from jaxkv.decoder import logits

    (row,) = evaluate(lm, **OPTIONS | {"caches": ["full"], "tasks": []})
    assert row["accuracy"] == {}
    tokens = jnp.asarray(draw_excerpts(lm, FILLER, 1100 + 12 + 1, 2, 0))
    out = logits(lm.params, forward(lm.params, tokens[:, :-1], config=lm.config), config=lm.config)
    expected = metrics.bits_per_byte(metrics.nll(out, tokens[:, 1:])[:, -12:], 24)
    assert row["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("protocol", [PROTOCOLS[0], pytest.param(PROTOCOLS[1], marks=pytest.mark.slow)])
def test_answers_are_what_greedy_generation_says(lm, tmp_path, protocol):
    """A made-up question whose answer is the model's own greedy continuation is right, another is wrong."""
    from jaxkv.cache import forward
    from jaxkv.decoder import logits

    ids = list((FILLER[:300] + "ask" + "now").encode())
    for _ in range(3):
        out = logits(lm.params, forward(lm.params, jnp.asarray([ids]), config=lm.config), config=lm.config)
        ids.append(int(out[0, -1].argmax()))

    class Latin(Bytes):  # every id is a character, so that any answer can be written down
        def encode(self, text):
            return list(text.encode("latin-1"))

    said = bytes(ids[-3:]).decode("latin-1")
    text = FILLER.replace("“", "'").replace("”", "'")
    ask = {"question": "ask", "prefix": "now"}
    wrong = said[:2] + chr((ord(said[2]) + 1) % 256)
    start = bytes(ids[:-9]).decode("latin-1")
    questions = [{"task": "right", "answer": said} | ask, {"task": "wrong", "answer": wrong} | ask]
    path = tmp_path / "samples.json"
    path.write_text(json.dumps({"contexts": [{"id": "1", "context": start, "questions": questions}]}))
    options = OPTIONS | {"text": text, "excerpts": 0, "context": 300, "caches": ["full", "h2o"], "budgets": ["25%"]}
    latin = Model(lm.config, lm.params, Latin())
    row, small = evaluate(latin, **options, samples_file=path, protocol=protocol)
    assert row["accuracy"] == {"right": 1.0, "wrong": 0.0} and row["answers"] == {"right": [True], "wrong": [False]}
    assert row["kl_mean"] is None and row["protocol"] == protocol
    assert small["asked"] == {"right": 1, "wrong": 1} and small["bytes"] < row["bytes"]


@pytest.mark.parametrize(
    "name, budget",
    [
        ("recency", "30"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("h2o", "20"), ("scissorhands", "40"))),
    ],
)
def test_answers_are_what_greedy_generation_under_the_cache_says(lm, name, budget):
    """The answer's tokens must not see what reading the question has evicted, as they would in one extend."""
    policy, context = make_policy(name), list(FILLER[:200].encode())
    length, agreed = len(context) + 24, 0
    small = plan(lm.config, policy, budget, lengths=[length], dtype="float32")
    whole = plan(lm.config, Full(observe=(policy,)), None, lengths=[length], dtype="float32")
    _, full = read(lm.params, [context], new_state(lm.config, whole, [length]), config=lm.config)
    for seed in range(8):
        ask = np.random.default_rng(seed).integers(0, 256, 16).tolist()
        begin = lambda: compress(jax.tree.map(jnp.copy, full), small.spec, limits=small.limits)
        hidden, state = read(lm.params, [ask], begin(), config=lm.config)
        stops = build_stops([], [], set(), lm.config.vocab_size)
        request = Request(samplings=[Sampling()], max_new_tokens=[5], stops=stops)
        made, *_ = collect(run(lm.params, hidden, state, request, config=lm.config, prompts=[ask]), 0.0)
        said = made[0].token_ids
        assert _answers(lm, ask, said, 16, begin())
        assert not _answers(lm, ask, [*said[:-1], (said[-1] + 1) % 256], 16, begin())
        agreed += len(set(said)) > 1
    assert agreed  # the model does not always say the same byte


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"caches": []}, "no caches"),
        ({"caches": ["fast"]}, "unknown cache 'fast'; known: full"),
        ({"budgets": []}, "needs a budget"),
        ({"budgets": ["lots"]}, "'lots' is not understood"),
        ({"budgets": ["25%", "25%"]}, "repeated"),
        ({"budgets": ["2"], "caches": ["recency"]}, "protects"),
        ({"caches": [Scissorhands(), Scissorhands(window=40)]}, "two different caches"),
        ({"tasks": ["quiz"]}, "'quiz'; known: passkey"),
        ({"protocol": "guess"}, "unknown protocol 'guess'"),
        ({"seeds": []}, "at least one, such as"),
        ({"seeds": [2, 2]}, r"must be different.*got \[2, 2\]"),
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"next_tokens": 0}, "next_tokens must be at least 1"),
        ({"samples": -1}, "not be negative"),
        ({"context": 4090}, "exceed the model's 4096 positions"),
        ({"excerpts": 900}, "give a longer text"),
    ],
)
def test_bad_evaluations_are_refused_before_they_run(lm, changes, message, monkeypatch):
    monkeypatch.setattr("infer.evaluate.run.extend", None)
    with pytest.raises(ValueError, match=message):
        evaluate(lm, **OPTIONS | changes)


def test_the_table_of_tasks_names_what_it_makes():
    assert list(TASKS) == ["passkey", "magic"]
    assert all(task.summary and task.per_context >= 1 for task in TASKS.values())
