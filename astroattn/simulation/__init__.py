"""The network of Kozachkov, Kastanenka & Krotov, token by token, with the paper's letters; see docs/science.md."""

from astroattn.simulation.block import NeuronAstrocyteBlock
from astroattn.simulation.dynamics import Motion, TimeConstants, integrate
from astroattn.simulation.hidden import CompetitiveNeurons, HiddenNeurons, StaticNeurons
from astroattn.simulation.network import NeuronAstrocyteNetwork, Trace
from astroattn.simulation.streaming import StreamingNetwork

__all__ = [
    "CompetitiveNeurons",
    "HiddenNeurons",
    "Motion",
    "NeuronAstrocyteBlock",
    "NeuronAstrocyteNetwork",
    "StaticNeurons",
    "StreamingNetwork",
    "TimeConstants",
    "Trace",
    "integrate",
]
