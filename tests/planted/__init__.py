"""Small training programs: broken ones with one known defect each, and healthy ones that look suspicious."""
