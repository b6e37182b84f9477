"""Chat templates: rendering, and the strings around a conversation's turns."""

import dataclasses
import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxkv.checkpoints.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class ChatPieces:
    """Strings around the turns, so that each turn can be tokenized and cached when it comes.

        before_user + "question" + after_user + "answer" + after_answer + "question" + after_user + ...

    before_user: all before the first user content, the system message included.
    after_user: from a user's content to where the answer starts.
    after_answer: from an answer's content to the next user's content.
    """

    before_user: str
    after_user: str
    after_answer: str


def select_template(template: Any, where: str) -> str | None:
    """The template to use among those of a tokenizer_config.json: a string, or [{"name", "template"}, ...]."""
    if template is None or isinstance(template, str):
        return template
    named = {}
    if isinstance(template, list):
        named = {one["name"]: one["template"] for one in template if isinstance(one, dict) and len(one) == 2}
    elif isinstance(template, dict):
        named = template
    if not isinstance(named.get("default"), str):
        given = ", ".join(map(str, named)) or repr(template)[:80]
        raise CheckpointError(f"{where}: chat_template must be a string or have one named 'default'; it has {given}")
    return named["default"]


def render(template: str | None, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """Renders as transformers does: sandboxed, blocks trimmed, with `raise_exception`, `strftime_now` and `tojson`.

    Raises:
      CheckpointError: no template, an invalid one, or one that refuses these messages.
    """
    if template is None:
        raise CheckpointError(
            "this checkpoint has no chat template (chat_template in tokenizer_config.json, chat_template.jinja, or "
            "tokenizer.chat_template in a GGUF); write the prompt as plain text instead"
        )
    import jinja2

    try:
        compiled = _environment().from_string(template)
        variables = {"tools": None, "documents": None} | variables
        return compiled.render(messages=[dict(message) for message in messages], **variables)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"the chat template is not valid: line {error.lineno}: {error.message}") from error
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise CheckpointError(f"the chat template refuses messages of roles [{roles}]: {error}") from error


def _environment() -> Any:
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks answers for training; here it only shows its body."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )  # not HTML-escaped, unlike Jinja's own

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def pieces(apply: Callable[..., str], *, system: str | None) -> ChatPieces:
    """Cuts the pieces out of conversations rendered with sentinels, and checks them on a longer conversation.

    Args:
      apply: (messages, add_generation_prompt=...) -> text.
      system: a system message, or None for what the template does without one.
    Raises:
      CheckpointError: the template does not put the same strings around every turn.
    """
    users = [f"jaxkv-user-{n}-sentinel" for n in range(3)]
    answers = [f"jaxkv-answer-{n}-sentinel" for n in range(2)]
    head = [] if system is None else [{"role": "system", "content": system}]

    def talk(turns: int) -> list[dict[str, str]]:
        said = [*head, {"role": "user", "content": users[0]}]
        for n in range(turns):
            said += [{"role": "assistant", "content": answers[n]}, {"role": "user", "content": users[n + 1]}]
        return said

    before_user, after_user = _cut(apply(talk(0), add_generation_prompt=True), users[:1])
    parts = _cut(apply(talk(1), add_generation_prompt=True), [users[0], answers[0], users[1]])
    found = ChatPieces(before_user, after_user, parts[2])
    gap = parts[1][len(after_user) :]  # a space that some templates write and some models generate
    if not parts[1].startswith(after_user) or gap.strip():
        raise CheckpointError(
            f"the chat template puts {after_user!r} before a new answer and {parts[1]!r} before an earlier one; "
            "a conversation cannot be continued piece by piece"
        )
    expected = before_user + users[0]
    for n in range(2):
        expected += after_user + gap + answers[n] + found.after_answer + users[n + 1]
    expected += after_user
    if apply(talk(2), add_generation_prompt=True) != expected:
        raise CheckpointError(
            "the chat template changes earlier turns as a conversation grows, so it cannot be continued piece by piece"
        )
    return found


def _cut(text: str, sentinels: list[str]) -> list[str]:
    """The strings between the sentinels, each of which must occur once, in order."""
    found = []
    for sentinel in sentinels:
        if text.count(sentinel) != 1:
            raise CheckpointError(f"the chat template writes a turn's content {text.count(sentinel)} times, not once")
        before, text = text.split(sentinel)
        found.append(before)
    return [*found, text]
