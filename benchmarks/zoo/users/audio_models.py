"""Audio and text-line networks as people write them: torchaudio has no build beside the newest torch."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from benchmarks.zoo.users.model import Model, sized


class M5(nn.Module):
    """Waveform classifier of torchaudio's tutorial (Dai et al. 2017)."""

    def __init__(self, channels: int = 32, classes: int = 35) -> None:
        super().__init__()
        widths, kernels = (1, channels, channels, 2 * channels, 2 * channels), (80, 3, 3, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(c, d, k, stride=4 if k == 80 else 1), nn.BatchNorm1d(d), nn.ReLU(), nn.MaxPool1d(4))
            for c, d, k in zip(widths, widths[1:], kernels, strict=False)
        )
        self.fc1 = nn.Linear(2 * channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Log probabilities."""
        for block in self.blocks:
            x = block(x)
        x = nn.functional.avg_pool1d(x, x.shape[-1]).permute(0, 2, 1)
        return self.fc1(x).log_softmax(2)


def wav2letter(features: int = 40, classes: int = 29) -> nn.Module:
    """Collobert et al. 2016, as torchaudio has it for MFCC."""
    layers: list[nn.Module] = []
    widths = [(features, 250, 48, 2, 23), *[(250, 250, 7, 1, 3)] * 7, (250, 500, 32, 1, 16), (500, 500, 1, 1, 0)]
    for c, d, k, s, p in widths:
        layers += [nn.Conv1d(c, d, k, s, p), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv1d(500, classes, 1), nn.LogSoftmax(1))


class DeepSpeech2(nn.Module):
    """Two strided convolutions over the spectrogram, bidirectional recurrences, a linear layer."""

    def __init__(self, recurrent: type[nn.Module] = nn.LSTM, bins: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 32, (41, 11), (2, 2), (20, 5)), nn.BatchNorm2d(32), nn.Hardtanh(0, 20, inplace=True),
            nn.Conv2d(32, 32, (21, 11), (2, 1), (10, 5)), nn.BatchNorm2d(32), nn.Hardtanh(0, 20, inplace=True),
        )  # fmt: skip
        self.rnn = recurrent(32 * bins // 4, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(2 * hidden, 29)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, bins, frames) to (batch, frames, characters)."""
        x = self.conv(x)
        batch, channels, bins, frames = x.size()
        x = x.view(batch, channels * bins, frames).transpose(1, 2)
        return self.fc(self.rnn(x)[0])


class CRNN(nn.Module):
    """Reader of text lines (Shi et al. 2015): a VGG of height one, two bidirectional LSTMs."""

    def __init__(self, hidden: int = 128, classes: int = 37) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for k, (c, d) in enumerate(
            zip((1, 32, 64, 128, 128, 256, 256), (32, 64, 128, 128, 256, 256, 256), strict=True)
        ):
            layers += [nn.Conv2d(c, d, 2 if k == 6 else 3, padding=0 if k == 6 else 1), nn.BatchNorm2d(d), nn.ReLU()]
            if k in (0, 1):
                layers.append(nn.MaxPool2d(2))
            if k in (3, 5):
                layers.append(nn.MaxPool2d((2, 2), (2, 1), (0, 1)))
        self.cnn = nn.Sequential(*layers)
        self.rnn = nn.LSTM(256, hidden, num_layers=2, bidirectional=True)
        self.out = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 32, width) to (steps, batch, classes)."""
        features = self.cnn(x)
        if features.shape[2] != 1:
            raise ValueError("the height must be 32")
        return self.out(self.rnn(features.squeeze(2).permute(2, 0, 1))[0])


class CNNGRU(nn.Module):
    """Sound event detector: convolutions with frequency pooling, one GRU."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        widths = (1, 32, 64, 128)
        self.cnn = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(c, d, 3, padding=1), nn.BatchNorm2d(d), nn.ReLU(), nn.MaxPool2d((4, 1)))
                for c, d in pairwise(widths)
            )
        )
        self.gru = nn.GRU(128, 64, bidirectional=True, batch_first=True)
        self.out = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 64, frames) to (batch, frames, classes)."""
        x = self.cnn(x).squeeze(2).transpose(1, 2)
        return self.out(self.gru(x)[0]).sigmoid()


MODELS = {
    "M5": Model(M5, "m5", "cnn", ((4000,), (6000,)), sized(1)),
    "wav2letter": Model(wav2letter, "wav2letter", "cnn", ((200,), (300,)), sized(40)),
    "DeepSpeech2-lstm": Model(DeepSpeech2, "deepspeech", "other", ((64, 60), (64, 90)), sized(1)),
    "DeepSpeech2-gru": Model(lambda: DeepSpeech2(nn.GRU), "deepspeech", "other", ((64, 60), (64, 90)), sized(1)),
    "CRNN": Model(CRNN, "crnn", "other", ((32, 100), (32, 140)), sized(1)),
    "CNN-GRU": Model(CNNGRU, "cnn_gru", "other", ((64, 40), (64, 60)), sized(1)),
}
