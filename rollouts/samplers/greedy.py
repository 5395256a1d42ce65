"""Equal greedy requests that are in flight together are answered once; sampled ones never are."""

from __future__ import annotations

from functools import partial

from ..once import Once
from .base import Sample, Sampler, SampleRequest, SamplerError


class GreedyOnce:
    """`Sampler.sample` of `sampler`, with greedy requests coalesced: same prompt, version, bounds and trust domain.

    A greedy answer is a function of these. Whoever comes first asks, in his own session and by his own deadline; if
    that fails, or he is gone, the others are not.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._once = Once(lambda _: None, partial(SamplerError, "the sampler was closed"))

    async def sample(self, request: SampleRequest) -> Sample:
        """See `Sampler`."""
        if request.params.temperature > 0:
            return await self._sampler.sample(request)
        name = (request.prompt, request.version, request.max_tokens, request.stop, request.params, request.trust_domain)
        tries = 0
        while True:
            led, sample = await self._once.do(name, tries, partial(self._sampler.sample, request))
            if sample is not None:
                return sample
            if led:
                raise AssertionError("unreachable: a sampler answers or raises")
            tries += 1
