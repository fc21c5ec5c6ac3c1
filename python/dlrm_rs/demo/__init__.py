"""`dlrm-rs demo`: a DLRM trained on real flights twice, with torch's embeddings and with ours.

Both start from the same weights, see the same batches in the same order, and have the same dense layers and optimizers.
They take turns at every step, so that whatever else the machine does hits both alike. Then ours is quantized to every
row format, to show what fewer bytes cost.
"""
