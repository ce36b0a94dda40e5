"""What is known of a run or an export, and how it is shown: manifest, card, inspection, page."""
