"""What a rank records of where its time goes."""
