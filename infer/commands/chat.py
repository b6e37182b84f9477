"""`jaxkv chat`: a conversation over one budgeted cache."""

import sys

from infer.commands.options import check_early, generation_options, load, running_options, sampling
from infer.console import Bar, Refused, note, read_text, refuse, whole


def add_options(sub):
    """Declares the options."""
    sub.add_argument("--document", help="a text file to read before the first question")
    sub.add_argument("--max-tokens", type=whole(1), help="planned length of it all; default: the model's window")
    running_options(sub)
    generation_options(sub)


def run(arguments) -> int:
    """Runs the subcommand. Returns: the exit code."""
    check_early(arguments)
    if arguments.document == "-":
        raise Refused("--document takes a file, because standard input holds the questions")
    document = None if arguments.document is None else read_text(arguments.document)
    if document == "":
        raise Refused(f"{arguments.document} is empty; leave --document out to talk without one")
    lm = load(arguments)
    session = lm.session(
        cache=arguments.cache, budget=arguments.budget, max_tokens=arguments.max_tokens, streaming=arguments.streaming
    )
    note(arguments, session.plan.describe())
    if document:
        with Bar(arguments, "reading", "layer") as bar:
            session.extend(document, progress=bar)
    options = dict(max_new_tokens=arguments.max_new_tokens, sampling=sampling(arguments), stop=arguments.stop)
    answered, code = False, 0
    try:
        while True:
            question = input("> " if sys.stdin.isatty() else "")
            if not question.strip():
                continue
            try:
                for piece in session.stream(question, **options):
                    if isinstance(piece, str):
                        print(piece, end="", flush=True)
                        answered = True
                print()
            except ValueError as error:  # too long a question leaves the conversation as it was
                code = refuse(error)
    except EOFError:
        return code
    except UnicodeDecodeError as error:
        raise Refused("standard input is not UTF-8; convert it to UTF-8") from error
    except KeyboardInterrupt:
        if not answered:
            raise
        print("\n(interrupted; the conversation ends here)")
        return code
