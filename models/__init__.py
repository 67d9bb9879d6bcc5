"""What is believed: generative models, their guides, and what is known of them exactly."""
