"""Keeping stored KV in order: checking it, deleting what nobody needs, copying it elsewhere."""
