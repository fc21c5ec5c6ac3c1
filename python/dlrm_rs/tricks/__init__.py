"""Embeddings of fewer bytes, or with weights of their own, as facebookresearch/dlrm has them; the tables are ours."""

from dlrm_rs.tricks.feature_bags import FeatureBags
from dlrm_rs.tricks.mixed_dimensions import PrEmbeddingBag, md_solver
from dlrm_rs.tricks.quotient_remainder import QREmbeddingBag
from dlrm_rs.tricks.weighted_pooling import WeightedEmbeddingBag

__all__ = ["FeatureBags", "PrEmbeddingBag", "QREmbeddingBag", "WeightedEmbeddingBag", "md_solver"]
