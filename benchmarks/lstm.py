"""A small LSTM language model: the stand-in for anyone's own torch.nn.Module, which no model library knows.

squeeze opens it as model path `benchmarks.lstm:factory` with `weights: benchmarks/cache/lstm`, the folder that
benchmarks/train_lstm.py makes. It is written the way its owner would write it, with nothing for squeeze's sake: a plain
`forward`, no config, no registration. It has what an own module brings along: a matrix shared by input and output, and
recurrent weights, whose integer kernel takes them in an order of its own.

Zaremba, Sutskever & Vinyals 2014 (arXiv:1409.2329), their small model with Press & Wolf 2017's tied output matrix
(arXiv:1608.05859, section 3); we train with AdamW in one pass of minutes, where they use SGD for dozens of epochs.
"""

from torch import Tensor, nn

VOCABULARY = 4096
WIDTH = 256
LAYERS = 2
DROPOUT = 0.2
EMBEDDING_SPREAD = 0.3
"""Standard deviation of the first embedding: with the usual 1/16 the LSTM sees next to nothing and idles for epochs."""


class LstmLanguageModel(nn.Module):
    """Next-token scores from an embedding, stacked LSTM layers and the embedding's own matrix as output."""

    def __init__(self, vocabulary: int = VOCABULARY, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, num_layers=layers, dropout=DROPOUT, batch_first=True)
        self.dropout = nn.Dropout(DROPOUT)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_SPREAD)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Tokens [batch, length] -> scores of the token that follows each, [batch, length, vocabulary]."""
        states, _ = self.lstm(self.dropout(self.embedding(input_ids)))
        scores: Tensor = self.lm_head(self.dropout(states))
        return scores


def factory() -> nn.Module:
    """The network at its standard size, with random weights from torch's global generator."""
    return LstmLanguageModel()
