"""Questions asked, answers scored, arms compared with intervals."""
