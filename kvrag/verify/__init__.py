"""`kvrag verify`: does blending stored KV give what full prefill gives, with the model in use?

`gate.verify` runs the checks; each module beside it is one of them. Everything is seen from the
outside, through the engine and the names of the strategies, so that a new strategy is checked
without being known here.
"""
