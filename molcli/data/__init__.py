"""From text to batches, one module per step.

readers -> documents -> tokenizer -> packing -> order -> mixture: rows of files are read, checked,
tokenized, packed into rows of one length, and drawn in a reproducible order, from several sources
by weight. `repeats` adds rows that repeat themselves, made from these. Two forms on disk shorten
the path: `token_folder` holds tokens, `logits` holds rows with a parent's predictions. Both are
checked against their sums (`checked`, `token_shard`, `logit_shard`).
"""
