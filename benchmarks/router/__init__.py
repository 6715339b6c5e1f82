"""What the router costs and bears: `python -m benchmarks.router --help`.

    client (ours, or k6) ──> router, pinned to one CPU ──> fake engines of a set speed
           └──────────────> the same engines, without it; a plain proxy that parses, as a baseline

All on one machine. What others run on it disturbs times; so streams are counted per *CPU second of
the router's process*, and what is compared runs in turns.
"""
