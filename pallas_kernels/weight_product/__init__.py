"""Products of a few rows with stored weights, where a decode step spends its time."""

from pallas_kernels.weight_product.api import (
    IMPLEMENTATIONS,
    MOST_ROWS,
    Product,
    pays,
    turned_off,
    weight_product,
    weight_products,
)

__all__ = ["IMPLEMENTATIONS", "MOST_ROWS", "Product", "pays", "turned_off", "weight_product", "weight_products"]
