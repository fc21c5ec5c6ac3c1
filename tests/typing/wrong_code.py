"""Mistakes that `mypy --strict` must find: every line with a comment, by the error that the comment names."""

import torch

import dlrm_rs

dlrm_rs.EmbeddingBag("10", 4)  # arg-type
dlrm_rs.EmbeddingBag(10, 4, optimiser=None)  # call-arg
dlrm_rs.Embedding(10, 4, optimizer=torch.optim.SGD)  # arg-type
dlrm_rs.EmbeddingBagConfig("t", 10, 4)  # call-arg
dlrm_rs.EmbeddingBagCollection([("t", 10, 4, ["f"])])  # list-item
dlrm_rs.optim.SGD(lr="fast")  # arg-type
dlrm_rs.replace_embeddings(3)  # type-var
dlrm_rs.KeyedTensor(["a"], [1], torch.zeros(1, 1)).vlaues()  # attr-defined
dlrm_rs.quantise(torch.nn.Linear(1, 1))  # attr-defined
