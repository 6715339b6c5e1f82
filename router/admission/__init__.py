"""Who may send the next request to the backends, and who waits or is told to come back.

    admit ──> rate limit of the tenant ──> room? ──yes──────────────────────────> run ──> settle
                       │ refused             └─no──> queue of (class, tenant) ──turn──┘
                       v                               │ full, too slow, expired
                    RESOURCE_EXHAUSTED + RetryInfo <───┘

`policy` is the file that operators write, `core` decides (no I/O, no clock of its own), `cost`
reads what a request asks for out of its bytes, `gate` is what handlers call.
"""
