"""The last part: last blocks if any, norm, classifier, and the loss.

The tail's network is a `Part` that classifies (`fedsplit.front.vit`); this place holds what is done
with its logits.
"""
