from torch import nn

import facevae
from facevae.model.vae import Network


@facevae.register_term("edges", weight=2.0)
def edges(recon, target):
    return (recon.diff(dim=-1) - target.diff(dim=-1)).abs().mean((1, 2, 3))


@facevae.register_metric("edge_error", better="lower", label="Edge error")
def edge_error(recon, target):
    return (recon.diff(dim=-1) - target.diff(dim=-1)).abs().mean((1, 2, 3))


@facevae.register_network("tiny")
def tiny(config):
    side = config.size // 4
    encoder = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(8 * side**2, 32))

    def decoder(channels):
        grid = [nn.Flatten(), nn.Linear(config.latent_dim, 8 * side**2), nn.Unflatten(1, (8, side, side))]
        return nn.Sequential(*grid, nn.Upsample(scale_factor=4), nn.Conv2d(8, channels, 3, padding=1))

    return Network(encoder, 32, decoder(3), decoder(1) if config.mask_decoder else None)
