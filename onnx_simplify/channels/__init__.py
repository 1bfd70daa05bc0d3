"""Channel analysis: layouts (which channel sits where) and facts (constant? needed?)."""
