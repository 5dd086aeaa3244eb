"""
What is done: blocking work on threads of every kind. None of it is handed an id, none of it asks for one.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from opentelemetry import trace

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from repositories import AuditRepository, OrderRepository, StockRepository

tracer = trace.get_tracer("layers.services")

CARRIERS = {"post": 490, "bike": 350, "van": 1200}  # cents for each parcel
PRICES = {"lamp": 3900, "desk": 42000}


class PricingService:
    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self.log = logging.getLogger("layers.services.PricingService")

    def price(self, sku: str, reference: str) -> int:
        """
        Ask all carriers at once; blocking, so call it on a thread.
        """

        def ask(carrier: str) -> int:
            self.log.info("%s offers %d for %s", carrier, CARRIERS[carrier], reference)
            return CARRIERS[carrier]

        with tracer.start_as_current_span("pricing.price", attributes={"reference": reference}):
            return PRICES[sku] + min(self._pool.map(ask, CARRIERS))


class OrderService:
    def __init__(
        self,
        orders: OrderRepository,
        stock: StockRepository,
        audit: AuditRepository,
        pricing: PricingService,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._orders = orders
        self._stock = stock
        self._audit = audit
        self._pricing = pricing
        self._pool = pool
        self.log = logging.getLogger("layers.services.OrderService")

    async def place(self, sku: str, reference: str) -> int | None:
        """
        Return the number of the new order, or None where nothing is left of the article.
        """
        self.log.info("placing %s", reference)
        loop = asyncio.get_running_loop()
        taken, price = await asyncio.gather(
            asyncio.to_thread(self._stock.take, sku, reference),
            loop.run_in_executor(None, self._pricing.price, sku, reference),
        )
        # Nobody waits for the audit; it may be written when the response is out.
        self._pool.submit(self._audit.add, reference, "placed" if taken else "refused")
        if not taken:
            return None
        return await asyncio.to_thread(self._orders.add, reference, sku, price)

    def find(self, number: int) -> dict[str, object] | None:
        return self._orders.find(number)
