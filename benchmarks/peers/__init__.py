"""dtkit beside what else runs training on several processes; `make peers` runs it."""
