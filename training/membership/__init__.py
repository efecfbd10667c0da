"""Who takes part in the job: how the ranks meet, lose each other and meet again."""
