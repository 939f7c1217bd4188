"""What each part of a recipe is worth: trained without it, over several seeds."""
