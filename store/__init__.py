"""The store: encoded blocks of KV, kept in tiers, found by key, checked on every load.

It knows keys, bytes and limits. It does not know models, prompts or requests, and imports nothing
else of kvrag. Only `store.codecs` deals in tensors; everything else moves opaque segments.
"""
