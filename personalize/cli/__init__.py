"""The terminal: parse, call, print. Nothing is computed here."""
