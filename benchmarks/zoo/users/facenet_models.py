"""facenet-pytorch: the recognition network and the three of MTCNN."""

from __future__ import annotations

from torch import nn

from benchmarks.zoo.users.model import Model


def _recognition(classify: bool) -> nn.Module:
    from facenet_pytorch import InceptionResnetV1

    return InceptionResnetV1(pretrained=None, classify=classify, num_classes=10)


def _detection(name: str) -> nn.Module:
    from facenet_pytorch.models import mtcnn

    return getattr(mtcnn, name)(pretrained=False)


MODELS = {
    "InceptionResnetV1": Model(lambda: _recognition(False), "inception_resnet", sizes=((96, 96), (128, 96))),
    "InceptionResnetV1-classify": Model(lambda: _recognition(True), "inception_resnet", sizes=((96, 96), (128, 96))),
    "PNet": Model(lambda: _detection("PNet"), "mtcnn", sizes=((24, 24), (32, 40))),
    "RNet": Model(lambda: _detection("RNet"), "mtcnn", sizes=((24, 24),)),
    "ONet": Model(lambda: _detection("ONet"), "mtcnn", sizes=((48, 48),)),
}
