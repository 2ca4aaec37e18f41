"""REST over one engine. Needs the `serve` extra; nothing else of kvrag imports this package."""
