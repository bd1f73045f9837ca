"""Inside a trained model: `analysis` makes the numbers (torch, no HTML), `page` makes the one HTML file of them."""
