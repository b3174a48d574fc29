"""IDS -> LOGITS. The one decoder, dense and mixture of experts."""
