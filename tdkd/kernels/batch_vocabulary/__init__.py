"""batch_vocabulary: plain PyTorch on every device, since it is of the vocabulary's size, not of the
logits'; :mod:`.reference` is all there is."""
