/** The kernel families by name, fastest first. */
export const FAMILIES = ['matrix', 'subgroup', 'base'] as const;

export type Family = (typeof FAMILIES)[number];
