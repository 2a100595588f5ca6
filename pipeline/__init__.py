"""The reprolora library. `docs/architecture.md` says which file holds what."""
