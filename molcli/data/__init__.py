"""From text to batches, one module per step.

documents -> tokenizer -> packing -> order -> mixture: documents are read, tokenized, packed into
rows of one length, and drawn in a reproducible order, from several sources by weight. Two forms on
disk shorten the path: `token_folder` holds tokens, `logits` holds rows with a parent's predictions.
"""
