"""The passes: each rewrites a working model in place into another valid one."""
