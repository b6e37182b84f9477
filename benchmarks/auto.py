"""Which tiers lose least at each share of the bytes, under the policy and the head budgets of `auto`; smollm2, float32.

    python benchmarks/auto.py [--text FILE_OR_NAME] [--budgets 25%,12.5%] [--tiers NAMES] [--contexts 3] [--out FILE]

Fewer bits keep more tokens in the same bytes. The winner at each share goes into `jaxkv.presets.AUTO` by hand; the text is
one that no published figure is measured on.
"""

import functools

from quality import measure, options

from jaxkv.presets import PRESETS, Preset, tiers

CANDIDATES = {
    "8/8": tiers((1.0, "int8")),
    "half 8/8, half 8/4": tiers((0.5, "int8"), (0.5, "int8", "rotated4")),
    "8/4": tiers((1.0, "int8", "rotated4")),
    "half 8/4, half 4/4": tiers((0.5, "int8", "rotated4"), (0.5, "rotated4")),
    "4/4": tiers((1.0, "rotated4")),
    "30% 4/4, 70% 4/3": tiers((0.3, "rotated4"), (0.7, "rotated4", "rotated3")),
    "40% 4/3, 60% 3/2": tiers((0.4, "rotated4", "rotated3"), (0.6, "rotated3", "rotated2")),
}


def main():
    """Evaluates the candidates and writes the table."""
    parser = options(
        __doc__,
        text="wikitext2-valid",
        budgets="25%,12.5%,6.25%",
        title="Tiers for `auto`",
        seeds=1,
        excerpts=3,
        contexts=3,
    )
    parser.add_argument("--tiers", default=";".join(CANDIDATES), help="bits of keys/values, with semicolons")
    given = parser.parse_args()
    preset = functools.partial(Preset, summary="", policy=PRESETS["auto"].policy)
    chosen = {name: CANDIDATES[name] for name in given.tiers.split(";")}
    caches = [preset(name=name, parts=parts, calibrated=((0.0, parts),)) for name, parts in chosen.items()]
    measure(parser, given, caches, script="auto.py")


if __name__ == "__main__":
    main()
