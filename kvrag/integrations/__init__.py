"""Adapters for other frameworks, each behind an extra of its own. Nothing else imports them."""
