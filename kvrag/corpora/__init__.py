"""Corpora as wholes: listing, checking, mending, exporting, importing and dropping them."""
