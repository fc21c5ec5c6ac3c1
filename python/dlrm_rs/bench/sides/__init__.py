"""What is compared: a side is a library with tables of its own. One file per library.

Every side pools by sum, in inference (`torch.no_grad`), from int64 ids to float32. Peers do not check ids where that
can be chosen; ours always does. Peers that have one table a module may leave their outputs apart, one per table.
"""

from dlrm_rs.bench.sides.side import PEERS, Peer, Side

__all__ = ["PEERS", "Peer", "Side"]
