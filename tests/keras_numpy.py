"""The authors' network in NumPy, channels last, with TensorFlow's padding rules.

Written from its description, sharing no code with facevae.

Weights are named and laid out as Keras saves them; the names count up in the order of creation.
"""

import numpy as np
from scipy.special import expit

ENCODER = [(32, 32), (64, 64), (128, 128), (256, 256), (256,), (256,), (512,)]
DECODER = [256, 256, 256, 128, 64, 32, 32]


def random_weights(masked: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights {"layer/weight": array} of the whole network."""
    generator, weights, counts = np.random.default_rng(seed), {}, {}

    def add(kind, channels, kernel=None, name=None):
        index = counts.get(kind, 0)
        counts[kind] = index + (name is None)
        name = name or (f"{kind}_{index}" if index else kind)
        if kernel is None:
            for weight, low, high in (
                ("gamma", 0.7, 1.3),
                ("beta", -0.2, 0.2),
                ("moving_mean", -0.2, 0.2),
                ("moving_variance", 0.5, 1.5),
            ):
                weights[f"{name}/{weight}"] = generator.uniform(low, high, channels).astype("f4")
        else:
            scale = np.sqrt(6 / (np.prod(kernel[:-2]) * sum(kernel[-2:])))
            weights[f"{name}/kernel"] = generator.uniform(-scale, scale, kernel).astype("f4")
            weights[f"{name}/bias"] = generator.uniform(-0.1, 0.1, channels).astype("f4")

    def conv(in_channels, out_channels, name=None):
        add("conv2d", out_channels, (3, 3, in_channels, out_channels), name)

    in_channels = 3
    for stage in ENCODER:
        for out_channels in stage:
            conv(in_channels, out_channels)
            add("batch_normalization", out_channels)
            in_channels = out_channels
    for name in ("dense", "z_mean", "z_logvar"):
        add("dense", 512, (512, 512), name)
    for widths, channels, head in (
        (DECODER, 3, "out_image_pre" if masked else "out_image"),
        ([32] * 7, 1, "out_mask"),
    )[: 1 + masked]:
        in_channels = 512
        for out_channels in widths:
            add("conv2d_transpose", out_channels, (3, 3, out_channels, in_channels))
            add("batch_normalization", out_channels)
            conv(out_channels, out_channels)
            add("batch_normalization", out_channels)
            in_channels = out_channels
        conv(in_channels, channels, head)
    return weights


class Network:
    """Runs the network; layers of a kind are taken in the order of their numbers."""

    def __init__(self, weights):
        self.weights, self.counts = weights, {}

    def layer(self, kind, name=None):
        index = self.counts.get(kind, 0)
        self.counts[kind] = index + (name is None)
        name = name or (f"{kind}_{index}" if index else kind)
        return {key.split("/")[1]: value for key, value in self.weights.items() if key.split("/")[0] == name}

    def conv(self, x, name=None):
        """3x3, stride 1, 'same'."""
        layer, height, width = self.layer("conv2d", name), x.shape[1], x.shape[2]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        out = sum(
            padded[:, i : i + height, j : j + width] @ layer["kernel"][i, j]
            for i in range(3)
            for j in range(3)
        )
        return out + layer["bias"]

    def transposed(self, x, same):
        """3x3, stride 2: every input pixel stamps the kernel; 'same' keeps the first 2n rows and columns."""
        layer, (batch, height, width, _) = self.layer("conv2d_transpose"), x.shape
        out = np.zeros((batch, 2 * height + 1, 2 * width + 1, layer["bias"].size), "f4")
        for i in range(3):
            for j in range(3):
                out[:, i : i + 2 * height : 2, j : j + 2 * width : 2] += x @ layer["kernel"][i, j].T
        return (out[:, : 2 * height, : 2 * width] if same else out) + layer["bias"]

    def norm_elu(self, x):
        layer = self.layer("batch_normalization")
        x = (x - layer["moving_mean"]) / np.sqrt(layer["moving_variance"] + 1e-3) * layer["gamma"] + layer[
            "beta"
        ]
        return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))

    def dense(self, x, name):
        layer = self.layer("dense", name)
        return x @ layer["kernel"] + layer["bias"]

    def decode(self, x, widths, head):
        for step in range(len(widths)):
            x = self.norm_elu(self.transposed(x, same=step != 2))
            x = self.norm_elu(self.conv(x))
        return expit(self.conv(x, head))

    def __call__(self, images):
        """Everything the network gives for images (B, 144, 144, 3) in [0, 1]."""
        self.counts, x = {}, images
        for stage in ENCODER:
            for _ in stage:
                x = self.norm_elu(self.conv(x))
            half = x.shape[1] // 2
            x = x[:, : 2 * half, : 2 * half].reshape(len(x), half, 2, half, 2, -1).max((2, 4))
        x = self.dense(x.reshape(len(x), -1), "dense")
        x = np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
        mean, log_std = self.dense(x, "z_mean"), self.dense(x, "z_logvar")
        masked = any(key.startswith("out_mask/") for key in self.weights)
        recon = self.decode(mean[:, None, None], DECODER, "out_image_pre" if masked else "out_image")
        if not masked:
            return {"image": images, "z_mean": mean, "z_log_std": log_std, "out_image": recon}
        mask = self.decode(mean[:, None, None], [32] * 7, "out_mask")
        return {
            "image": images,
            "z_mean": mean,
            "z_log_std": log_std,
            "out_image_pre": recon,
            "out_mask": mask,
            "out_image": recon * mask + images * (1 - mask),
        }


def save_keras(path, weights, interleave=True):
    """Write weights as Keras' save_weights does: a group a layer, listed in another order than made."""
    import h5py

    layers = list(dict.fromkeys(key.split("/")[0] for key in weights))
    if interleave:
        layers = sorted(layers, key=lambda name: (len(name), name))
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in layers]
        file.attrs["keras_version"], file.attrs["backend"] = b"2.15.0", b"tensorflow"
        for name in layers:
            for key, value in weights.items():
                if key.split("/")[0] == name:
                    file[f"{name}/{name}/{key.split('/')[1]}:0"] = value
