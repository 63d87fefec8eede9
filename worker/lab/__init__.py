"""What no hospital's worker runs: evaluation, phantom studies, demonstration, montages, a site's training studies."""
