"""The engine's end of the host tier. Public: `HostTier` and its words (host_tier), `open_host_tier`
(factory)."""
