"""What is compared: a side is a library with tables of its own. One file per library.

Every side pools by sum, from int64 ids: in inference (`torch.no_grad`), to float32, or of fp16 and bf16 rows to their
dtype unless it is faster with float32; or in a training step, which is forward to float32, backward from one and the
same gradient, and update. Peers do not check ids where that can be chosen; ours always does. Peers that have one table
a module may leave their outputs apart, one per table, and one that has them stacked may have one upon another.
"""

from dlrm_rs.bench.sides.side import PEERS, TRAINING_PEERS, Peer, Side

__all__ = ["PEERS", "TRAINING_PEERS", "Peer", "Side"]
